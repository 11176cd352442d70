"""Rows are fetched here: from mapped files, by whole windows, or one by one."""

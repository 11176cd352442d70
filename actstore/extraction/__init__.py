"""Extraction: from a job to committed segments. It joins hooks, tokens and store; it never imports ray."""

"""Dashboards: what features are active on, as a folder of pages and tables, made in one pass over a store."""

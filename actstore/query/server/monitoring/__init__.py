"""Monitoring shows operators what a server does: its access log and its counters."""

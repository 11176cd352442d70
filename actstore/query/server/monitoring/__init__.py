"""Monitoring tells operators what a server does: its log of requests and its counters."""

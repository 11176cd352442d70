"""Admission checks every request before a route sees it: who sends it, and whether there is room for it."""

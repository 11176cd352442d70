"""Admission is what every request passes before a route sees it: who asks, and how much may be asked."""

"""Suites that other implementations of actstore's interfaces can run against themselves; they need pytest."""

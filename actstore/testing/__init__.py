"""Test suites that other implementations of actstore's interfaces can run on themselves; they need pytest."""

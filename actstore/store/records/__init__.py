"""The records of a growing store: commits, runs, their seals, and the manifest."""

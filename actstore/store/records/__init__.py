"""Records are what is written while a store grows: commits, runs, their seals, and the manifest."""

"""Reading gives rows of an open store, for as long as it is the one that was opened."""

"""Generation of text with functions on hooks."""

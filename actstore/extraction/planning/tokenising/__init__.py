"""Tokenising, the first stage of planning: all text is read, packed, and positions and columns to keep are chosen."""

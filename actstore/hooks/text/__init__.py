"""Text and token ids: checking what users give, and turning one into the other."""

"""Text and token ids come in here as users give them, and go out as users read them."""

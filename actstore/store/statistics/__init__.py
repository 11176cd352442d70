"""Statistics of values are computed here, added up exactly, and written down."""

"""Statistics of values: computing them, adding them up exactly, and writing them down."""

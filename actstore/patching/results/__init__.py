"""Results of patching: numbers with labels, tables of them, and pictures."""

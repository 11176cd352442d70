"""What commands show while they work: lines and bars that are redrawn."""

"""Takes the memory of a server process from one budget before it is allocated."""

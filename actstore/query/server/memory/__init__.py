"""Memory of a server process is taken from one budget before it is allocated, and given back."""

"""The cache holds the values of one forward, and computes what follows from them."""

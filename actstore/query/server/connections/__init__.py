"""Admits the connections of clients, limits them, and writes to them."""

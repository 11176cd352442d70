"""The store behind ``actstore.open("http://...")``. Needs no extra."""

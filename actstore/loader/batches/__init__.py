"""Batches are made here: their rows, the memory that they take, and the copy to a device."""

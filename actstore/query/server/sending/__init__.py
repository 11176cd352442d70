"""Sending turns results and errors into the bytes of replies, piece by piece."""

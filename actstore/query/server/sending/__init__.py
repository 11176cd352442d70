"""Sending turns answers and errors into bytes of replies, piece by piece while they are sent."""

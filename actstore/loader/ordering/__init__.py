"""Ordering computes which row comes when, from seed, epoch and place alone."""

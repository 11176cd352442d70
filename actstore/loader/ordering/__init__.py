"""Ordering computes which row comes when, from nothing but seed, epoch and place."""

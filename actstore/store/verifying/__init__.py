"""Verifying compares every byte of a store with its records, and repair removes what is damaged."""

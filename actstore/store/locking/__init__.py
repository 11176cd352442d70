"""Locking decides who may write to a store: processes hold leases, and writers and repairs take turns."""

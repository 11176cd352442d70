"""Naming hooks: as users type them and as stores keep them. Nothing here needs torch."""

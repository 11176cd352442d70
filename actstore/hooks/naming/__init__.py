"""Hooks have names and points here, as users type them and as stores keep them; none of it needs torch."""

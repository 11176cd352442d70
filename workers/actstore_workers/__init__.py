"""Extraction on Ray. This is the only package of actstore that imports ray."""

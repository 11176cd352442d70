"""Extraction on Ray. The only code of actstore that imports ray."""

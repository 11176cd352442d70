"""Labelled rows: what is to be predicted, which side of the split a row is on, and passes over rows."""

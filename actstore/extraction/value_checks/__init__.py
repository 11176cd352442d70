"""These checks compare stored values with those of a model that computes them once more."""

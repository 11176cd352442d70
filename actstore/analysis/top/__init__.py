"""The rows with the largest values of features, with their text, as tables and as pages."""

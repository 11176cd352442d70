"""How results are shown: tables in notebooks, and pictures."""

"""How cells of a grid are computed: as packed rows that start where they are patched, or as whole rows."""

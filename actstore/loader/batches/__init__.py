"""One batch is made here: its rows, the memory that they take, and its way to a device."""

"""Documents given in memory: lists, arrays, tables and data sets, each document a prompt of its own."""

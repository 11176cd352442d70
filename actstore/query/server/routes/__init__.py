"""Routes are the HTTP interface, with one file for each kind of thing that is asked for."""

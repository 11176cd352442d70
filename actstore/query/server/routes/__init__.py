"""Routes are the HTTP interface, with one file for each kind of resource."""

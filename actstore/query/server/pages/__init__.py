"""Pages for people who open a server in a browser."""

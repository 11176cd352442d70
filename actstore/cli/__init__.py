"""The command line, with one file per command. Heavy imports happen inside the commands."""

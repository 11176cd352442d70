"""The command line: one file a command. Heavy imports happen inside of the commands."""

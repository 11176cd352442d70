"""The command line, with one file per command. Heavy imports happen inside the commands.

To add a command ``name``, write ``name_command`` in a file of that name, and add a line to the table in `main`.
"""

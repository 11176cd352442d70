"""The command line. Heavy imports happen inside the commands.

To add a command ``name``, write ``name_command`` in a file of that name, in `commands` or `analysing`, and add a line
to the table in `main`.
"""

"""Commands that analyse a store, one file a command."""

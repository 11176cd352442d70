"""Messages say in few words what a user gave, and in one sentence why a model could not be loaded."""

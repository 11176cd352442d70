"""Parts of error messages: what a user gave in few words, and why a model could not be loaded."""

"""The command line, and the local ranks that it starts."""

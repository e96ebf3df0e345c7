"""The tests, one folder for each package; a package itself, so that no other `tests` is taken for it."""

"""The tests, one folder per package. A package itself, so that no other package `tests` is imported in its place."""

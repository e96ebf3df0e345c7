"""A process of a run, from its search path and signals to its exit code."""

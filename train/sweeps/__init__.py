"""A run as one of a sweep: how it ended, in the sweep's folder, and whether it goes on."""

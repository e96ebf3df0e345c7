"""What is computed: the LongCat-Flash model, free of process groups, files and flags."""

__version__ = "0.1.0"

"""The run folder: its configuration, how the run ended, and files that notice damage."""

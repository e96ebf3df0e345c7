"""Hydra groups: one folder for each group, one file for each choice."""

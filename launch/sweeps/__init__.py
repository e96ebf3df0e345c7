"""Sweeps: several runs from one command, in one folder that a later command goes on with."""

"""Stages of training: what holds in each, and the switch from one to the next."""

"""Restarts without people: what ended the ranks, what follows, where the wall time went."""

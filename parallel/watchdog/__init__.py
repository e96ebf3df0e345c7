"""Hangs: spans say what each rank does, heartbeats carry them, a diagnosis names the rank that delays the others."""

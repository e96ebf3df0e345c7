"""Hangs: spans say what each rank does, heartbeats carry that, a diagnosis names the rank that holds others up."""

"""Collectives that start and wait: autograd nodes, CUDA streams, and point-to-point messages on CPUs."""

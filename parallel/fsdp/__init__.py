"""Fully sharded data parallelism by FSDP2: what is sharded where, its collectives, gradient accumulation."""

"""The second sharding engine, DeepSpeed's ZeRO 1 to 3; the one room that touches DeepSpeed's private names."""

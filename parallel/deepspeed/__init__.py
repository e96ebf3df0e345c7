"""The second sharding engine, DeepSpeed's ZeRO 1 to 3; the only folder that uses DeepSpeed's private names."""

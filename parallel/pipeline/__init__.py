"""Pipeline parallelism: stages, schedules, deferred weight gradients, and a simulator of schedules."""

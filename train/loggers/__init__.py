"""Where the metrics of each step go: JSON lines in the run folder, wandb, TensorBoard."""

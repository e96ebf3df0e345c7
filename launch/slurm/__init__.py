"""`longcat slurm`: an sbatch script that keeps a training job alive."""

"""The commands of `heddle-loadtest`, one file each: options to calls, and nothing else."""

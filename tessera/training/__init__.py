"""What every training stands on: a run, its optimizers, checkpoints and logs."""

"""The training loop: steps, checkpoints, metrics, progress."""

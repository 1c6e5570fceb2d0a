"""What `seer-jax plot` takes, and the block maps that it reads from a text."""

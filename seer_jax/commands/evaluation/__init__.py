"""What `seer-jax eval` measures besides perplexity and pass keys."""

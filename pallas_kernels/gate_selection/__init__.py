"""Lists of key blocks from gate logits."""

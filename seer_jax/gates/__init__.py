"""The learned gates: what they look like and what they compute."""

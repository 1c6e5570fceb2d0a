"""Dense causal attention that also returns what a gate should learn."""

"""Dense causal attention that also returns training targets of gates."""

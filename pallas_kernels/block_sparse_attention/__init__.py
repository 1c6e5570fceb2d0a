"""Attention over a list of key blocks per query block."""

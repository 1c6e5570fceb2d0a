"""Blocks of tokens as one vector each."""

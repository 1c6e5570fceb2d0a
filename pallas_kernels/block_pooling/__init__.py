"""Pooling of blocks of tokens."""

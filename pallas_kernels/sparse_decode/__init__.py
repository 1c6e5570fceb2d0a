"""Attention of one new token per sequence over a list of key blocks."""

"""Scores of key blocks for queries, before softmax."""

"""Scores of key blocks that are joined from several vectors per block."""

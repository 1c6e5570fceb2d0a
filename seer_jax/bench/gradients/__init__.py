"""Gradients of operations measured."""

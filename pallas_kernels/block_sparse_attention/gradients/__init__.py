"""Gradients of `block_sparse_attention`."""

"""What the backends of `block_sparse_attention` share to skip blocks of negligible weight while they attend (BLASST)."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

_LOWEST = -1e30  # below every difference of scores, and finite: added to a running maximum it gives no NaN


def tile_queries(block_size: int) -> int:
    """Queries that skip a block together: a block of them, at most 64, which are the rows of a Hopper matrix product."""
    return min(block_size, 64)


def log_threshold(skip_threshold: Float32[Array, "H"]) -> Float32[Array, "H"]:
    """ln(lambda), at most 0, and finite where lambda is 0. NaN, which compares as false, skips nothing."""
    return jnp.clip(jnp.log(skip_threshold), _LOWEST, 0)

"""The definition of `score_blocks` in plain float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int


def score_blocks(
    queries: Float32[Array, "B T H C"],
    keys: Float32[Array, "B Sb K C"],
    *,
    scale: float,
    causal: bool,
    row_offset: Int[Array, ""],
) -> Float32[Array, "B H T Sb"]:
    """See the function of this name in api.py. Computes all entries, whatever `causal` is."""
    del causal, row_offset
    keys = jnp.repeat(keys, queries.shape[2] // keys.shape[2], axis=2)
    return scale * jnp.einsum("bthc,bjhc->bhtj", queries, keys, precision="highest")

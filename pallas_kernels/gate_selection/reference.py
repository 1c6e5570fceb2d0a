"""The definition of `select_blocks`, by ranks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.blocks import BlockIndices


def _rank(priority: Float32[Array, "*lists R Sb"]) -> Array:
    """Place of each block when the row is sorted from best to worst, ties to the lower number."""
    return jnp.argsort(jnp.argsort(-priority, axis=-1, stable=True), axis=-1)


def select_blocks(
    logits: Float32[Array, "*lists R Sb"],
    *,
    block_size: int,
    threshold: Float[Array, "*lists R 1"] | None,
    top_k: int | None,
    max_blocks: int | None,
    keep: Bool[Array, "*lists R Sb"] | None,
    width: int,
) -> BlockIndices:
    """See the function of this name in api.py."""
    allowed = logits > -jnp.inf
    logits = jnp.where(allowed, logits, -jnp.inf)
    keep = jnp.zeros(logits.shape, bool) if keep is None else keep
    if threshold is not None:
        probabilities = jnp.where(allowed, jax.nn.softmax(logits, axis=-1), 0)
        chosen = (allowed & (probabilities > threshold)) | keep
    elif top_k is not None:
        chosen = (allowed & (_rank(logits) < top_k)) | keep
    elif max_blocks is not None:
        chosen = (allowed | keep) & (_rank(jnp.where(keep, jnp.inf, logits)) < max_blocks)
    else:
        chosen = allowed | keep
    return BlockIndices.from_mask(chosen, block_size=block_size, max_blocks=width)

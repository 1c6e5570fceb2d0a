"""The definition of `select_blocks`, by ranks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.blocks import BlockIndices


def _rank(priority: Float32[Array, "*lists R Sb"]) -> Array:
    """Rank of each block in its row, from best to worst, ties to the lower block number."""
    return jnp.argsort(jnp.argsort(-priority, axis=-1, stable=True), axis=-1)


def _better_mass(probabilities: Float32[Array, "*lists R Sb"]) -> Array:
    """Total probability of the better blocks of its row, for each block."""
    descending = jnp.sort(probabilities, axis=-1, descending=True)
    return jnp.take_along_axis(jnp.cumsum(descending, axis=-1) - descending, _rank(probabilities), axis=-1)


def select_blocks(
    logits: Float32[Array, "*lists R Sb"],
    *,
    block_size: int,
    threshold: Float32[Array, "*lists R 1"] | None,
    mass: Float32[Array, "*lists R 1"] | None,
    top_k: int | Int32[Array, "*lists R 1"] | None,
    max_blocks: int | Int32[Array, "*lists R 1"] | None,
    keep: Bool[Array, "..."] | None,
    visible: Int32[Array, "*lists R 1"] | None,
    width: int,
) -> BlockIndices:
    """See the function of this name in api.py."""
    seen = True if visible is None else jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < visible
    allowed = (logits > -jnp.inf) & seen  # a comparison with NaN is false
    logits = jnp.where(allowed, logits, -jnp.inf)
    keep = jnp.broadcast_to(False if keep is None else keep, logits.shape) & seen
    probabilities = jnp.where(allowed, jax.nn.softmax(logits, axis=-1), 0)
    if threshold is not None:
        chosen = (allowed & (probabilities > threshold)) | keep
    elif mass is not None:
        chosen = (allowed & ((_better_mass(probabilities) < mass) | (mass >= 1))) | keep
    elif top_k is not None:
        chosen = (allowed & (_rank(logits) < top_k)) | keep
    elif max_blocks is not None:
        chosen = (allowed | keep) & (_rank(jnp.where(keep, jnp.inf, logits)) < max_blocks)
    else:
        chosen = allowed | keep
    return BlockIndices.from_mask(chosen, block_size=block_size, max_blocks=width)

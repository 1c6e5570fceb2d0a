"""`select_blocks` in XLA, for any device: no sort but `top_k`, and a running count that turns the mask into lists."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.blocks import BlockIndices


@functools.partial(jax.jit, static_argnames=("block_size", "top_k", "max_blocks", "width"))
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
    logits = jnp.where(logits > -jnp.inf, logits, -jnp.inf)  # NaN is not greater than anything
    keep = jnp.zeros(logits.shape, bool) if keep is None else keep
    if threshold is not None:
        chosen = _softmax(logits) > threshold
    elif top_k is not None:
        chosen = _best(logits, top_k)
    elif max_blocks is not None:
        chosen = keep = _best(jnp.where(keep, jnp.inf, logits), max_blocks)
    else:
        chosen = logits > -jnp.inf
    return BlockIndices.from_mask(chosen | keep, block_size=block_size, max_blocks=width)


def _softmax(logits: Float32[Array, "*lists R Sb"]) -> Float32[Array, "*lists R Sb"]:
    """Softmax over the row; 0 throughout where the row has no finite logit."""
    maximum = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(maximum > -jnp.inf, maximum, 0))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _best(priority: Float32[Array, "*lists R Sb"], number: int) -> Bool[Array, "*lists R Sb"]:
    """The `number` best entries of each row above -inf, ties to the lower number."""
    number = min(number, priority.shape[-1])
    worst = jax.lax.top_k(priority, number)[0][..., -1:]
    above = priority > worst
    ties = (priority == worst) & (priority > -jnp.inf)
    return above | (ties & (jnp.cumsum(ties, axis=-1) <= number - above.sum(-1, keepdims=True)))

"""`select_blocks` in XLA, for any device: sorts for `mass` and short rows of `top_k` alone, and turns masks into lists by a running count."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from pallas_kernels.blocks import BlockIndices

LONG = 4096  # columns from which a number of blocks is found by bisection: a sort of 16384 takes a GPU longer than attention to a tenth of them


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
    number = max_blocks if top_k is None else top_k
    most = min(number, logits.shape[-1]) if isinstance(number, int) else logits.shape[-1]
    if isinstance(number, int):
        number = jnp.full((1,) * logits.ndim, number)
    return _select(block_size, width, max_blocks is not None, most, logits, threshold, mass, number, keep, visible)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _select(
    block_size: int,
    width: int,
    counts_keep: bool,
    most: int,
    logits: Float32[Array, "*lists R Sb"],
    threshold: Float32[Array, "*lists R 1"] | None,
    mass: Float32[Array, "*lists R 1"] | None,
    number: Int32[Array, "..."] | None,
    keep: Bool[Array, "..."] | None,
    visible: Int32[Array, "*lists R 1"] | None,
) -> BlockIndices:
    """Selects blocks; `number`, at most `most`, is the number of top blocks, `counts_keep` whether it includes those in `keep`."""
    seen = True if visible is None else jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < visible
    allowed = (logits > -jnp.inf) & seen  # a comparison with NaN is false
    logits = jnp.where(allowed, logits, -jnp.inf)
    keep = jnp.broadcast_to(False if keep is None else keep, logits.shape) & seen
    if threshold is not None:
        chosen = _softmax(logits) > threshold
    elif mass is not None:
        chosen = _best_by_mass(jnp.where(allowed, _softmax(logits), -jnp.inf), mass)
    elif number is not None:
        priority = jnp.where(keep, jnp.inf, logits) if counts_keep else logits
        number = jnp.clip(number, 1, most)
        if priority.shape[-1] > LONG:
            chosen = _best(priority, number, _nth_largest(priority, number))
        else:
            chosen = _best(priority, number, _entry(jax.lax.top_k(priority, most)[0], number))
    else:
        chosen = allowed
    chosen = chosen if counts_keep else chosen | keep
    with jax.named_scope("lists"):
        return BlockIndices.from_mask(chosen, block_size=block_size, max_blocks=width)


def _softmax(logits: Float32[Array, "*lists R Sb"]) -> Float32[Array, "*lists R Sb"]:
    """Softmax over each row; 0 throughout if a row has no finite logit."""
    maximum = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(maximum > -jnp.inf, maximum, 0))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _best_by_mass(
    probabilities: Float32[Array, "*lists R Sb"], mass: Float32[Array, "*lists R 1"]
) -> Bool[Array, "*lists R Sb"]:
    """Applies the rule `mass` of api.py; probabilities are -inf for blocks that must not be chosen."""
    descending = jnp.sort(probabilities, axis=-1, descending=True)
    weights = jnp.maximum(descending, 0)
    better = jnp.cumsum(weights, axis=-1) - weights
    number = ((better < mass) | (mass >= 1)).sum(-1, keepdims=True)
    number = jnp.clip(number, 1, descending.shape[-1])
    return _best(probabilities, number, _entry(descending, number))


def _entry(descending: Float32[Array, "*lists R most"], number: Int32[Array, "..."]) -> Float32[Array, "*lists R 1"]:
    """Entry `number` of each row, counted from 1."""
    return jnp.take_along_axis(descending, jnp.broadcast_to(number, (*descending.shape[:-1], 1)) - 1, axis=-1)


def _nth_largest(x: Float32[Array, "*lists R Sb"], number: Int32[Array, "..."]) -> Float32[Array, "*lists R 1"]:
    """Entry `number` of each row in descending order, bit by bit: the largest pattern that so many entries reach."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # patterns that are ordered like the floats

    def take(i: Int32[Array, ""], found: UInt32[Array, "*lists R 1"]) -> UInt32[Array, "*lists R 1"]:
        more = found | (sign >> i.astype(jnp.uint32))
        return jnp.where((order >= more).sum(-1, keepdims=True) >= number, more, found)

    found = jax.lax.fori_loop(0, 32, take, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def _best(
    priority: Float32[Array, "*lists R Sb"], number: Int32[Array, "..."], worst: Float32[Array, "*lists R 1"]
) -> Bool[Array, "*lists R Sb"]:
    """The top `number` entries of each row above -inf, ties to the lower index; `worst` is the last of them."""
    above = priority > worst
    ties = (priority == worst) & (priority > -jnp.inf)
    return above | (ties & (jnp.cumsum(ties, axis=-1) <= number - above.sum(-1, keepdims=True)))

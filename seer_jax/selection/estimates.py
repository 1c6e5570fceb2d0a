"""Estimates of attention that scorers share: products in float32, means of sub-blocks, and the attention of a prompt's last queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from seer_jax.selection.context import PrefillContext

TINY = float(jnp.finfo(jnp.float32).tiny)


def product(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Einsum with sums in float32. Inputs of 16 bits are multiplied as they are, float32 without rounding."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def grouped(q: Float[Array, "B T H D"], num_kv_heads: int) -> Float[Array, "B T K G D"]:
    """Queries by the key/value head that they read."""
    return q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])


def without(x: Float[Array, "B T heads D"], valid: Bool[Array, "#B T"]) -> Float[Array, "B T heads D"]:
    """x with zeros in place of tokens that are not valid, which may hold NaN."""
    return jnp.where(valid[..., None, None], x, jnp.zeros_like(x))


def padded(x: Shaped[Array, "B T *rest"], multiple: int) -> Shaped[Array, "B _ *rest"]:
    """x with zeros behind its tokens, up to a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def log(shares: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Logarithm of shares of attention as scores before softmax. A share of 0 becomes the smallest score, not -inf, so that its block
    can be chosen last."""
    return jnp.log(jnp.maximum(shares, TINY))


def log_shares(logits: Float32[Array, "*rows Sb"], seen: Bool[Array, "..."]) -> Float32[Array, "*rows Sb"]:
    """Log-softmax over the entries that are seen; -inf elsewhere."""
    logits = jnp.where(seen, logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logits - jnp.where(total > -jnp.inf, total, 0)


def by_block(x: Float[Array, "*rows S"], block_size: int, fill: float = 0.0) -> Float[Array, "*rows Sb b"]:
    """The last axis cut into blocks, with `fill` behind its end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_size)], constant_values=fill)
    return x.reshape(*x.shape[:-1], -1, block_size)


def means(
    x: Float[Array, "B T heads D"], valid: Bool[Array, "#B T"], size: int, block_size: int
) -> tuple[Float32[Array, "B n heads D"], Bool[Array, "B n"]]:
    """Means over the valid tokens of runs of `size` tokens, for whole blocks, and which runs have any."""
    valid = jnp.broadcast_to(valid, x.shape[:2])
    x = padded(without(x, valid), block_size).astype(jnp.float32)
    counts = padded(valid, block_size).reshape(len(x), -1, size).sum(2)
    sums = x.reshape(len(x), -1, size, *x.shape[2:]).sum(2)
    return sums / jnp.maximum(counts, 1)[..., None, None], counts > 0


class LastQueries(NamedTuple):
    """What the last queries of each prompt attend to.

    Fields:
      mean: of these queries.
      vertical: attention probability of each key, summed over the queries and divided by their number.
      slash: the same of each distance between query and key.
    """

    mean: Float32[Array, "B H D"]
    vertical: Float32[Array, "B H S"]
    slash: Float32[Array, "B H S"]


def attend_last(context: PrefillContext, count: int) -> LastQueries:
    """Dense attention of the last `count` queries of each prompt, of those that the context holds.

    Args:
      context: with all queries of the pass.
      count: of queries; shorter prompts take all theirs.
    """
    q, k, tokens = context.q_rotated, context.k_rotated, context.q_rotated.shape[1]
    end, n = jnp.minimum(context.lengths, context.offset + tokens), min(count, tokens)
    position = end[:, None] - n + jnp.arange(n)[None]
    place = position - context.offset
    there = place >= 0
    q = without(jnp.take_along_axis(q, jnp.clip(place, 0)[..., None, None], axis=1), there)
    number = jnp.maximum(there.sum(1), 1)[:, None, None]
    logits = product("bnkgd,bskd->bkgns", grouped(q, k.shape[2]), without(k, context.valid_keys))
    logits = logits.reshape(len(q), -1, n, k.shape[1]) * q.shape[-1] ** -0.5
    seen = context.key_positions[:, None] <= position[..., None]
    attention = jnp.where(there[:, None, :, None], jnp.exp(log_shares(logits, seen[:, None])), 0)
    mean = q.astype(jnp.float32).sum(1) / number
    return LastQueries(mean, attention.sum(2) / number, _diagonal_sums(attention, end) / number)


def _diagonal_sums(attention: Float32[Array, "B H n S"], end: Int[Array, "B"]) -> Float32[Array, "B H S"]:
    """Sums over query and key pairs of equal distance, for queries at positions end - n .. end - 1."""
    *lead, n, keys = attention.shape
    # Query r moves n - 1 - r places to the right, after which all pairs of one distance stand in one column.
    width = keys + n
    skewed = jnp.pad(attention[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, n))).reshape(*lead, n * width)
    columns = skewed[..., : n * (width - 1)].reshape(*lead, n, width - 1).sum(2)
    column = end[:, None] - 1 - jnp.arange(keys)[None]
    sums = jnp.take_along_axis(columns, jnp.clip(column, 0)[:, None], axis=2)
    return jnp.where(column[:, None] >= 0, sums, 0)


def columns_and_diagonals(
    vertical: Float32[Array, "B H Sb"], slash: Float32[Array, "B H Sb"], context: PrefillContext
) -> Float32[Array, "B H Tb Sb"]:
    """Score of each block as the larger of its column's and its diagonal's, so that the best blocks are a union of columns and
    diagonals; in logarithms."""
    row = context.first_row + jnp.arange(context.num_rows)
    diagonal = jnp.clip(row[:, None] - jnp.arange(context.num_key_blocks)[None], 0)
    return log(jnp.maximum(vertical[:, :, None], slash[:, :, diagonal]))

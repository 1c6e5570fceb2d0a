"""Scores of blocks from several queries per row and keys per block."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.precision import precise_einsum

_LOW = -1e30


@functools.partial(jax.jit, static_argnames=("queries_per_row", "keys_per_block", "join", "heads"))
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5, 6))
def _score(queries, keys, seen, queries_per_row, keys_per_block, join, heads):
    (batch, tu, num_heads, dim), (_, sw, kv_heads, _) = queries.shape, keys.shape
    rows, blocks = -(-tu // queries_per_row), -(-sw // keys_per_block)
    queries = jnp.pad(queries, ((0, 0), (0, rows * queries_per_row - tu), (0, 0), (0, 0)))
    seen = jnp.pad(seen, ((0, 0), (0, rows * queries_per_row - tu), (0, 0)))
    keys = jnp.pad(keys, ((0, 0), (0, blocks * keys_per_block - sw), (0, 0), (0, 0))).astype(jnp.float32)
    grouped = queries.reshape(batch, -1, kv_heads, num_heads // kv_heads, dim) * dim**-0.5
    scores = precise_einsum("bukgc,bwkc->bkguw", grouped, keys)
    w = jnp.arange(keys.shape[1])[None, None]
    visible = ((w >= seen[..., :1]) & (w < seen[..., 1:]))[:, None, None]
    scores = jax.nn.log_softmax(jnp.where(visible, scores, _LOW), -1)
    scores = jnp.where(visible, scores, _LOW).reshape(*scores.shape[:-1], blocks, keys_per_block)
    scores = scores.max(-1) if join == "max" else jax.nn.logsumexp(scores, -1)
    if heads == "each":
        scores = scores.reshape(batch, num_heads, *scores.shape[3:])
    elif heads == "max":
        scores = scores.max(2)
    else:
        scores = jax.nn.logsumexp(scores, 2) - math.log(scores.shape[2])
    scores = scores.reshape(*scores.shape[:2], rows, queries_per_row, blocks).max(3)
    return jnp.where(scores < _LOW / 2, -jnp.inf, scores)


def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "B Sw K C"],
    *,
    seen: Int[Array, "#B Tu 2"],
    queries_per_row: int,
    keys_per_block: int,
    join: str = "sum",
    heads: str = "each",
) -> Float32[Array, "B lists rows Sb"]:
    """See above."""
    return _score(queries, keys, seen, queries_per_row, keys_per_block, str(join), str(heads))

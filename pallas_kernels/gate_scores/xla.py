"""`score_blocks` in XLA, for any device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from pallas_kernels.precision import precise_einsum


@functools.partial(jax.jit, static_argnames=("scale", "causal"))
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
    (batch, rows, heads, dim), (_, blocks, kv_heads, _) = queries.shape, keys.shape
    if rows == 1:
        # A sum of products reads the keys in place, even as a slice of a larger array; a matrix product may copy them first.
        grouped = queries.reshape(batch, 1, kv_heads, heads // kv_heads, dim) * scale
        return (grouped * keys[:, :, :, None]).sum(-1).transpose(0, 2, 3, 1).reshape(batch, heads, 1, blocks)
    # One matrix product per key head, with the axes in the order of the result, which needs no transposition then.
    queries = (queries * scale).transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, dim)
    scores = precise_einsum("bkmc,bkjc->bkmj", queries, keys.transpose(0, 2, 1, 3))
    return scores.reshape(batch, heads, rows, blocks)


def score_blocks_gradients(
    cotangent: Float32[Array, "B H T Sb"],
    queries: Float32[Array, "B T H C"],
    keys: Float32[Array, "B Sb K C"],
    *,
    scale: float,
    causal: bool,
    row_offset: Int[Array, ""],
) -> tuple[Float32[Array, "B T H C"], Float32[Array, "B Sb K C"]]:
    """Gradients in queries and keys. Cotangents of entries that are not needed are ignored."""
    (batch, rows, heads, dim), (_, blocks, kv_heads, _) = queries.shape, keys.shape
    queries, keys = (x.transpose(0, 2, 1, 3) for x in (queries, keys))
    if causal:
        needed = jnp.arange(blocks)[None] <= row_offset + jnp.arange(rows)[:, None]
        cotangent = jnp.where(needed[None, None], cotangent, 0)
    grouped = (scale * cotangent).reshape(batch, kv_heads, -1, blocks)
    d_queries = precise_einsum("bkmj,bkjc->bkmc", grouped, keys).reshape(batch, heads, rows, dim)
    d_keys = precise_einsum("bkmj,bkmc->bkjc", grouped, queries.reshape(batch, kv_heads, -1, dim))
    return d_queries.transpose(0, 2, 1, 3), d_keys.transpose(0, 2, 1, 3)

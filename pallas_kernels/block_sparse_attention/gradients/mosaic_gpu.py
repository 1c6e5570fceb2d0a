"""Gradients of `block_sparse_attention` for Hopper GPUs, in Pallas Mosaic GPU. README.md in the folder above explains the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.block_sparse_attention.gradients.key_gradients import KEYS, KeySizes, key_gradients_kernel
from pallas_kernels.block_sparse_attention.gradients.query_gradients import query_gradients_kernel
from pallas_kernels.block_sparse_attention.gradients.transposed import listed_by, rows_within
from pallas_kernels.block_sparse_attention.query_tiles import Sizes
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.mosaic.flash_tiles import LOG2_E, QUERIES

TOKENS = 8  # TMA moves tokens in groups of 8
HEAVY = 4  # times the mean number of query tiles from which a column starts before all others


@functools.partial(jax.jit, static_argnames=("scale", "padded", "interpret"))
def gradients(
    results: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]],
    cotangents: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    padded: bool,
    interpret: Any,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Gradients in q, k and v, for arguments that the kernels take.

    d_q comes from one walk over the lists of each query tile, d_k and d_v from one over the transposed lists: every sum has one
    owner and one order.
    """
    (out, lse), (d_out, d_lse) = results, cotangents
    (batch, num_queries, heads, head_dim), (_, num_keys, kv_heads, _) = q.shape, k.shape
    seen = lse > -jnp.inf
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    if padded:
        # Padding may be NaN, which a weight of 0 would not keep out of a product.
        q, d_out = (jnp.where(seen[..., None], x, 0) for x in (q, d_out))
        inside = (jnp.arange(num_keys)[None] < lengths[:, None])[..., None, None]
        k, v = (jnp.where(inside, x, 0) for x in (k, v))
    q, k, v, d_out = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0))) for x in (q, k, v, d_out))
    statistics = _statistics(lse, delta, seen)
    offsets = jnp.stack([query_offset, lengths], axis=1)

    _, lists, rows = blocks.counts.shape
    b = blocks.block_size
    sizes = Sizes(batch, q.shape[1], heads, head_dim, kv_heads, lists, rows, b, False, False, num_queries)
    query_kernel = query_gradients_kernel(sizes, scale, interpret, q.dtype)
    d_q = query_kernel(q, k, v, blocks.counts, blocks.indices, offsets, d_out, statistics)

    listed, counts = key_columns(blocks, query_offset, lengths, heads, kv_heads, -(-num_keys // b))
    tiles, own = -(-num_keys // KEYS), lists > kv_heads
    words = listed.shape[-1] // (heads // kv_heads if own else 1)
    key_sizes = KeySizes(batch, k.shape[1], heads, kv_heads, head_dim, tiles, b // KEYS, words, own)
    key_kernel = key_gradients_kernel(key_sizes, scale, interpret, q.dtype)
    order = key_order(jnp.repeat(counts, b // KEYS, axis=2)[..., :tiles])
    d_k, d_v = key_kernel(q, k, v, d_out, statistics, listed, counts, order, offsets)
    return d_q[:, :num_queries], d_k[:, :num_keys], d_v[:, :num_keys]


def _statistics(
    lse: Float32[Array, "B T H"], delta: Float32[Array, "B T H"], seen: Bool[Array, "B T H"]
) -> Float32[Array, "B H tiles 2 64"]:
    """What kernels read of each query: lse in base 2 and the inner product of its weights and their gradients.

    With an lse of infinity, queries that see no key have weights of 0.
    """

    def tiled(x: Array, fill: float) -> Array:
        x = jnp.pad(x.transpose(0, 2, 1), ((0, 0), (0, 0), (0, -x.shape[1] % QUERIES)), constant_values=fill)
        return x.reshape(*x.shape[:2], -1, QUERIES)

    lse, delta = jnp.where(seen, lse * LOG2_E, jnp.inf), jnp.where(seen, delta, 0)
    return jnp.stack([tiled(lse, jnp.inf), tiled(delta, 0)], axis=3)


def key_columns(
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    heads: int,
    kv_heads: int,
    num_key_blocks: int,
) -> tuple[Int32[Array, "B K Sb words"], Int32[Array, "B K Sb"]]:
    """The query tiles that list each key block of each key/value head: their bits, and how many there are in all heads of a group.

    Where each query head has its own lists, the words of a group's heads follow one another.
    """
    batch, lists, _ = blocks.counts.shape
    rows = rows_within(blocks, query_offset, lengths)
    listed = listed_by(blocks, rows, num_key_blocks=num_key_blocks, repeat=blocks.block_size // QUERIES)
    shape = batch, kv_heads, num_key_blocks, -1
    if lists > kv_heads:
        listed, times = listed.reshape(batch, kv_heads, lists // kv_heads, num_key_blocks, -1), 1
        listed = listed.transpose(0, 1, 3, 2, 4).reshape(shape)
    else:
        listed, times = jnp.broadcast_to(listed, (batch, kv_heads, *listed.shape[2:])), heads // kv_heads
    return listed, times * jax.lax.population_count(listed).sum(-1)


def key_order(counts: Int32[Array, "B K tiles"]) -> Int32[Array, "n"]:
    """Which column each program takes: the long ones first, since one program walks the whole column.

    Those of a key/value head are adjacent otherwise, so that its queries stay in L2; in causal attention the first of them are the
    longest. A column that most queries list, such as that of an attention sink, would end long after all others if it started late.
    """
    flat = counts.reshape(-1)
    return jnp.argsort(flat <= HEAVY * flat.mean(), stable=True).astype(jnp.int32)

"""`sparse_decode_attention` in XLA, for any device: reads only the listed blocks of the cache, without copying it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.blocks import BlockIndices
from pallas_kernels.checks import BLOCK_SIZES
from pallas_kernels.sparse_rows import SparseRows, Tiling, attend_sparse_rows

_KEYS_PER_STEP = 512  # a row has few queries, so that it can take many keys at a time


@functools.partial(jax.jit, static_argnames=("scale",))
def sparse_decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    *,
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"],
    scale: float,
) -> tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """See the function of this name in api.py."""
    (batch, heads, head_dim), (_, num_keys, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    if blocks is None:
        blocks = _every_block(lengths, num_keys, kv_heads)
    start = cache_rows[:, None] * (num_keys * kv_heads) + jnp.arange(kv_heads)[None]
    rows = SparseRows(
        counts=blocks.counts.reshape(-1),
        indices=blocks.indices.reshape(-1, blocks.width),
        start=start.reshape(-1),
        limit=jnp.broadcast_to(lengths[:, None, None], (batch, kv_heads, group)).reshape(-1, group),
    )
    tiling = Tiling(blocks.block_size, scale, _KEYS_PER_STEP)
    out, lse = attend_sparse_rows(q.reshape(-1, group, head_dim), k, v, rows, tiling)
    return out.reshape(q.shape), lse.reshape(batch, heads)


@functools.partial(jax.jit, static_argnames=("scale",))
def sparse_decode_attention_gradients(
    cotangents: tuple[Float[Array, "B H D"], Float32[Array, "B H"]],
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    *,
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"],
    scale: float,
) -> tuple[Float[Array, "B H D"], Float[Array, "P S K D"], Float[Array, "P S K D"]]:
    """Gradients in q, k and v."""

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return sparse_decode_attention(q, k, v, blocks, lengths=lengths, cache_rows=cache_rows, scale=scale)

    return jax.vjp(attend, q, k, v)[1](cotangents)


def _every_block(lengths: Int[Array, "B"], num_keys: int, kv_heads: int) -> BlockIndices:
    """Lists of all blocks that contain keys."""
    size = BLOCK_SIZES[-1]
    counts = jnp.broadcast_to(-(-lengths // size)[:, None], (len(lengths), kv_heads))
    indices = jnp.arange(-(-num_keys // size), dtype=jnp.int32)
    return BlockIndices(counts, jnp.broadcast_to(indices, (*counts.shape, len(indices))), size)

"""`block_sparse_attention` in XLA, for any device: time follows the number of listed blocks. Differentiable in q, k and v."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.attend_rows import Rows, Tiling, attend_rows
from pallas_kernels.blocks import BlockIndices

_KEYS_PER_STEP = 128  # wide enough for matrix units; wider wastes work on short lists


@functools.partial(jax.jit, static_argnames=("scale",))
def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    """See the function of this name in api.py."""
    (batch, length, heads, head_dim), kv_heads, b = q.shape, k.shape[2], blocks.block_size
    num_rows = blocks.counts.shape[2]
    lists = max(blocks.counts.shape[1], kv_heads)  # heads that share a list and the keys go into one row of queries
    group = heads // lists
    axes = (batch, lists, num_rows)

    q = jnp.pad(q, ((0, 0), (0, num_rows * b - length), (0, 0), (0, 0)))
    q = q.reshape(batch, num_rows, b, lists, group, head_dim).transpose(0, 3, 1, 4, 2, 5)

    token = jnp.arange(num_rows * b)
    position = query_offset[:, None] + token[None]
    visible = (token < length)[None] & (position < lengths[:, None])
    limit = jnp.where(visible, position + 1, 0)
    limit = limit.reshape(batch, 1, num_rows, 1, b)
    start = jnp.arange(batch)[:, None] * (k.shape[1] * kv_heads) + jnp.arange(lists)[None] * kv_heads // lists

    rows = Rows(
        counts=jnp.broadcast_to(blocks.counts, axes).reshape(-1),
        indices=jnp.broadcast_to(blocks.indices, (*axes, blocks.width)).reshape(-1, blocks.width),
        start=jnp.broadcast_to(start[..., None], axes).reshape(-1),
        limit=jnp.broadcast_to(limit, (*axes, group, b)).reshape(-1, group * b),
    )
    out, lse = attend_rows(q.reshape(-1, group * b, head_dim), k, v, rows, Tiling(b, scale, _KEYS_PER_STEP))
    out = out.reshape(*axes, group, b, head_dim).transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, head_dim)
    lse = lse.reshape(*axes, group, b).transpose(0, 2, 4, 1, 3).reshape(batch, -1, heads)
    return out[:, :length], lse[:, :length]

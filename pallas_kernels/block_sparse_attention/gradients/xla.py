"""Gradients of keys and values in XLA, for any device: each block of keys walks the blocks of queries that list it.

No sum is scattered to: a GPU would add its parts in any order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.block_sparse_attention.gradients.transposed import rows_within
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.online_softmax import dot
from pallas_kernels.row_chunks import scan_chunks, with_chunk_elements
from pallas_kernels.sparse_rows import Tiling

_QUERIES_PER_STEP = 128  # fills matrix units; more would waste work on short lists


class _KeyRows(NamedTuple):
    """The blocks of keys of all key/value heads, and the blocks of queries that list them.

    Fields:
      counts: [R], number of blocks of queries.
      listed: [R, G' Tb], which they are; G' is G if each query head has its own lists, otherwise 1.
      sequence, kv_head, block: [R], what the row's keys are.
    """

    counts: Int32[Array, "R"]
    listed: Bool[Array, "R E"]
    sequence: Int32[Array, "R"]
    kv_head: Int32[Array, "R"]
    block: Int32[Array, "R"]


class _Queries(NamedTuple):
    """q, d_out [B, T, H, D] and lse, inner [B, T, H], see `sparse_rows_query_gradients`; position [B, T], that of the first key that a
    query does not see."""

    q: Float[Array, "B T H D"]
    d_out: Float[Array, "B T H D"]
    lse: Float32[Array, "B T H"]
    inner: Float32[Array, "B T H"]
    limit: Int32[Array, "B T"]


def key_gradients(
    scale: float,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    d_out: Float[Array, "B T H D"],
    lse: Float32[Array, "B T H"],
    inner: Float32[Array, "B T H"],
) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Gradients in k and v.

    Args:
      scale, q, k, v, blocks, query_offset, lengths: see api.py; q is 0 where a query sees no key.
      d_out: gradients in the output, 0 there too.
      lse, inner: see `sparse_rows_query_gradients`.
    """
    (batch, num_keys, kv_heads, head_dim), b = k.shape, blocks.block_size
    num_blocks, num_rows = -(-num_keys // b), blocks.counts.shape[2]
    position = query_offset[:, None] + jnp.arange(q.shape[1])[None]
    queries = _Queries(q, d_out, lse, inner, jnp.where(position < lengths[:, None], position + 1, 0))
    rows = _key_rows(blocks, query_offset, lengths, kv_heads, num_blocks)
    heads_at_once = q.shape[2] * num_rows // (kv_heads * rows.listed.shape[1])
    tiling = Tiling(b * heads_at_once, scale, _QUERIES_PER_STEP)

    def fold(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, num_blocks * b - num_keys), (0, 0), (0, 0)))
        return x.reshape(batch, num_blocks, b, kv_heads, head_dim).transpose(0, 3, 1, 2, 4).reshape(-1, b, head_dim)

    def unfold(x: Array) -> Array:
        x = x.reshape(batch, kv_heads, num_blocks, b, head_dim).transpose(0, 2, 3, 1, 4)
        return x.reshape(batch, -1, kv_heads, head_dim)[:, :num_keys]

    def chunk(_: Any, rows: _KeyRows, k: Float[Array, "X b D"], v: Float[Array, "X b D"]) -> Any:
        lists = BlockIndices.from_mask(rows.listed, block_size=b).indices
        lists = jnp.pad(lists, ((0, 0), (0, -lists.shape[1] % tiling.blocks_per_step)))

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_k, d_v = carry
            part = _gather(queries, rows, lists, i, num_rows, heads_at_once, b, tiling)
            weights, d_scores = _score_gradients(part, rows, k, v, scale)
            d_k += dot("xsw,xwd->xsd", d_scores, part.q)
            return d_k, d_v + dot("xsw,xwd->xsd", weights, part.d_out)

        steps = -(-rows.counts.max() // tiling.blocks_per_step)
        zeros = jnp.zeros(k.shape, jnp.float32)
        return (), tuple(x.astype(k.dtype) for x in jax.lax.fori_loop(0, steps, step, (zeros, zeros)))

    def run(elements: int, *arrays: Any) -> Any:
        return scan_chunks(chunk, (), *arrays, rows_per_chunk=tiling.rows_per_chunk(elements, b, head_dim))[1]

    d_k, d_v = with_chunk_elements(run, rows, fold(k), fold(v))
    return unfold(d_k), unfold(d_v)


def _key_rows(
    blocks: BlockIndices, query_offset: Int[Array, "B"], lengths: Int[Array, "B"], kv_heads: int, num_blocks: int
) -> _KeyRows:
    batch, lists, num_rows = blocks.counts.shape
    exists = rows_within(blocks, query_offset, lengths)[:, None, :, None]
    listed = blocks.to_mask(num_blocks) & exists  # [B, Hs, Tb, Sb]
    own = max(1, lists // kv_heads)
    listed = listed.reshape(batch, lists // own, own * num_rows, num_blocks).transpose(0, 1, 3, 2)
    axes = batch, kv_heads, num_blocks
    listed = jnp.broadcast_to(listed, (*axes, own * num_rows)).reshape(-1, own * num_rows)
    places = (jax.lax.broadcasted_iota(jnp.int32, axes, axis).reshape(-1) for axis in range(3))
    return _KeyRows(listed.sum(1, dtype=jnp.int32), listed, *places)


def _gather(
    queries: _Queries,
    rows: _KeyRows,
    lists: Int32[Array, "X N"],
    step: Array,
    num_rows: int,
    heads_at_once: int,
    b: int,
    tiling: Tiling,
) -> _Queries:
    """What the queries of a step hold, W of them for each row: [X, W, D] and [X, W], with a limit of 0 for those that take no part."""
    (_, num_queries, heads, head_dim), size = queries.q.shape, tiling.blocks_per_step
    entry = jax.lax.dynamic_slice_in_dim(lists, step * size, size, axis=1)
    valid = (step * size + jnp.arange(size))[None] < rows.counts[:, None]
    group = rows.listed.shape[1] // num_rows * heads_at_once
    head = rows.kv_head[:, None] * group + entry // num_rows * heads_at_once
    token = (entry % num_rows * b)[..., None] + jnp.arange(b)[None, None]
    valid = valid[..., None] & (token < num_queries)
    at = rows.sequence[:, None, None] * num_queries + jnp.minimum(token, num_queries - 1)
    limit = jnp.where(valid, queries.limit.reshape(-1)[at], 0)
    head = head[..., None] + jnp.arange(heads_at_once)[None, None]
    source = (at[:, :, None] * heads + head[..., None]).reshape(len(entry), -1)  # [X, size, heads at once, b]
    limit = jnp.broadcast_to(limit[:, :, None], (*head.shape, b)).reshape(source.shape)
    q, d_out = (x.reshape(-1, head_dim)[source] for x in (queries.q, queries.d_out))
    lse, inner = (x.reshape(-1)[source] for x in (queries.lse, queries.inner))
    return _Queries(q, d_out, lse, inner, limit)


def _score_gradients(
    queries: _Queries, rows: _KeyRows, k: Float[Array, "X b D"], v: Float[Array, "X b D"], scale: float
) -> tuple[Float[Array, "X b W"], Float[Array, "X b W"]]:
    """The weights of a step and the gradients of its scores, in k's dtype."""
    key = rows.block[:, None] * k.shape[1] + jnp.arange(k.shape[1])[None]
    scores = scale * dot("xsd,xwd->xsw", k, queries.q)
    scores = jnp.where(key[..., None] < queries.limit[:, None], scores, -jnp.inf)
    weights = jnp.exp(scores - queries.lse[:, None])
    d_weights = dot("xsd,xwd->xsw", v, queries.d_out)
    d_scores = jnp.where(weights > 0, scale * weights * (d_weights - queries.inner[:, None]), 0)
    return weights.astype(k.dtype), d_scores.astype(k.dtype)

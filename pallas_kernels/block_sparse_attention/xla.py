"""`block_sparse_attention` in XLA, for any device: its time is proportional to the number of listed blocks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from pallas_kernels.block_sparse_attention.gradients.xla import key_gradients
from pallas_kernels.block_sparse_attention.skipping import log_threshold, tile_queries
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.online_softmax import finite
from pallas_kernels.sparse_rows import (
    SparseRows,
    Tiling,
    attend_sparse_rows,
    attend_sparse_rows_skipping,
    inner_products,
    sparse_rows_query_gradients,
)

_KEYS_PER_STEP = 128  # fills matrix units; more would waste work on short lists


@functools.partial(jax.jit, static_argnames=("scale", "density", "padded"))
def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None = None,
    padded: bool = True,
    skip_threshold: Float32[Array, "H"] | None = None,
    cache_rows: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], Int32[Array, "B H tiles"] | None]:
    """See the function of this name in api.py. `density` and `padded` have no effect.

    A skipped block is computed and left out, since rows are computed many at a time: skipping saves no time here.
    """
    if skip_threshold is None:
        attended: Any = _attend(scale, q, k, v, blocks, query_offset, lengths, cache_rows)
        return *attended, None
    folding, rows = _fold_rows(q, k, blocks, query_offset, lengths, cache_rows)
    tiling = Tiling(blocks.block_size, scale, _KEYS_PER_STEP)
    threshold = folding.fold_tiles(log_threshold(skip_threshold))
    out, lse, kept = attend_sparse_rows_skipping(folding.fold(q), k, v, rows, threshold, tiling)
    return folding.unfold(out), folding.unfold(lse[..., None])[..., 0], folding.unfold_tiles(kept)


@functools.partial(jax.jit, static_argnames=("scale", "density", "padded"))
def block_sparse_attention_gradients(
    results: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], None],
    cotangents: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], None],
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None = None,
    padded: bool = True,
    skip_threshold: None = None,
    cache_rows: None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Gradients in q, k and v, from the results (out, lse, None) of any implementation and the gradients in those."""
    (out, lse, _), (d_out, d_lse, _) = results, cotangents
    seen = lse > -jnp.inf
    # Queries that see no key may hold anything, as may their cotangents: they take no part.
    q, d_out = (jnp.where(seen[..., None], x, 0) for x in (q, d_out))
    inner, lse = inner_products(out, lse, d_out, d_lse), finite(lse)
    d_k, d_v = key_gradients(scale, q, k, v, blocks, query_offset, lengths, d_out, lse, inner)
    folding, rows = _fold_rows(q, k, blocks, query_offset, lengths)
    tiling = Tiling(blocks.block_size, scale, _KEYS_PER_STEP)
    of_queries = (folding.fold(x[..., None])[..., 0] for x in (lse, inner))
    d_q = sparse_rows_query_gradients(tiling, folding.fold(q), k, v, rows, folding.fold(d_out), *of_queries)
    return jnp.where(seen[..., None], folding.unfold(d_q), 0), d_k, d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float,
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    folding, rows = _fold_rows(q, k, blocks, query_offset, lengths, cache_rows)
    out, lse = attend_sparse_rows(folding.fold(q), k, v, rows, Tiling(blocks.block_size, scale, _KEYS_PER_STEP))
    return folding.unfold(out), folding.unfold(lse[..., None])[..., 0]


def _forward_rule(scale: float, *arguments: Any) -> tuple[Any, Any]:
    results = _attend(scale, *arguments)
    return results, (results, arguments)


def _backward_rule(scale: float, residuals: Any, cotangents: Any) -> tuple:
    results, (q, k, v, blocks, query_offset, lengths, _) = residuals
    rest = dict(scale=scale, query_offset=query_offset, lengths=lengths)
    gradients = block_sparse_attention_gradients((*results, None), (*cotangents, None), q, k, v, blocks, **rest)
    return *gradients, None, None, None, None


_attend.defvjp(_forward_rule, _backward_rule)


class _Folding(NamedTuple):
    """Reshaping of queries into rows: the queries of a block, of all heads that share its list and its keys, form a row.

    Fields:
      axes: (B, lists or key/value heads, Tb), whose product is the number of rows.
      group: heads in a row.
      block_size: b.
      length: T.
    """

    axes: tuple[int, int, int]
    group: int
    block_size: int
    length: int

    def fold(self, x: Shaped[Array, "B T H D"], fill: float = 0) -> Shaped[Array, "R M D"]:
        """The rows, padded at the end of each sequence."""
        (batch, lists, num_rows), b = self.axes, self.block_size
        x = jnp.pad(x, ((0, 0), (0, num_rows * b - self.length), (0, 0), (0, 0)), constant_values=fill)
        x = x.reshape(batch, num_rows, b, lists, self.group, x.shape[-1]).transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, self.group * b, x.shape[-1])

    def unfold(self, x: Shaped[Array, "R M D"]) -> Shaped[Array, "B T H D"]:
        """Inverse of `fold`."""
        (batch, lists, _), b = self.axes, self.block_size
        x = x.reshape(*self.axes, self.group, b, x.shape[-1]).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, -1, lists * self.group, x.shape[-1])[:, : self.length]

    def fold_tiles(self, per_head: Shaped[Array, "H"]) -> Shaped[Array, "R row_tiles"]:
        """A value per head, for the tiles of queries of each row."""
        _, lists, _ = self.axes
        per_head = jnp.broadcast_to(per_head.reshape(lists, 1, self.group, 1), (*self.axes, self.group, self._tiles))
        return per_head.reshape(-1, self.group * self._tiles)

    def unfold_tiles(self, x: Shaped[Array, "R row_tiles"]) -> Shaped[Array, "B H tiles"]:
        """A value per tile of each row, for the tiles of each head."""
        batch, lists, _ = self.axes
        x = x.reshape(*self.axes, self.group, self._tiles).transpose(0, 1, 3, 2, 4)
        x = x.reshape(batch, lists * self.group, -1)
        return x[..., : -(-self.length // tile_queries(self.block_size))]

    @property
    def _tiles(self) -> int:
        """Tiles of a block."""
        return self.block_size // tile_queries(self.block_size)


def _fold_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"] | None = None,
) -> tuple[_Folding, SparseRows]:
    """The reshaping of queries into rows, and the keys that each row sees."""
    (batch, length, heads, _), kv_heads, b = q.shape, k.shape[2], blocks.block_size
    num_rows = blocks.counts.shape[2]
    lists = max(blocks.counts.shape[1], kv_heads)
    folding = _Folding((batch, lists, num_rows), heads // lists, b, length)

    token = jnp.arange(num_rows * b)
    position = query_offset[:, None] + token[None]
    visible = (token < length)[None] & (position < lengths[:, None])
    limit = jnp.where(visible, position + 1, 0)
    limit = limit.reshape(batch, 1, num_rows, 1, b)
    row = jnp.arange(batch) if cache_rows is None else cache_rows
    start = row[:, None] * (k.shape[1] * kv_heads) + jnp.arange(lists)[None] * kv_heads // lists
    return folding, SparseRows(
        counts=jnp.broadcast_to(blocks.counts, folding.axes).reshape(-1),
        indices=jnp.broadcast_to(blocks.indices, (*folding.axes, blocks.width)).reshape(-1, blocks.width),
        start=jnp.broadcast_to(start[..., None], folding.axes).reshape(-1),
        limit=jnp.broadcast_to(limit, (*folding.axes, folding.group, b)).reshape(-1, folding.group * b),
    )

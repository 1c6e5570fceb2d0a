"""Attention of rows of queries over lists of key blocks, in XLA, for prefill and decode.

A row is M queries that read one key/value head and share a list: in prefill a block of queries (times the heads that share its list),
in decode the heads of a group. Rows are sorted by the length of their lists and processed in chunks. A chunk walks its lists a few
blocks at a time and stops at the end of its longest one. So the time is proportional to the number of listed blocks, not to the width
of the lists, and no array is larger than a chunk of rows times a few key blocks.

Sorting mixes batch and heads: if those are sharded over a mesh, call this under `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.online_softmax import OnlineSoftmax, dot, finite
from pallas_kernels.row_chunks import scan_chunks, with_chunk_elements

_NOWHERE = 2**30  # a key position beyond every limit


class SparseRows(NamedTuple):
    """The lists of R rows, and the keys that their queries see.

    Fields:
      counts: [R], number of blocks on the list.
      indices: [R, N], the list.
      start: [R], index of the row's key at position 0 among the B * S * K vectors of `k`.
      limit: [R, M], queries see the keys at positions below their limits.
    """

    counts: Int32[Array, "R"]
    indices: Int32[Array, "R N"]
    start: Int32[Array, "R"]
    limit: Int32[Array, "R M"]


class Tiling(NamedTuple):
    """Static parameters: b, the factor on the scores, and the number of keys per step, at least one block."""

    block_size: int
    scale: float
    keys_per_step: int

    @property
    def blocks_per_step(self) -> int:
        """List entries per step."""
        return max(1, self.keys_per_step // self.block_size)

    def rows_per_chunk(self, elements: int, queries: int, head_dim: int) -> int:
        """Number of rows whose key tile and scores have at most `elements` elements each."""
        return max(1, elements // (self.blocks_per_step * self.block_size * max(queries, head_dim)))


def attend_sparse_rows(
    q: Float[Array, "R M D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], rows: SparseRows, tiling: Tiling
) -> tuple[Float[Array, "R M D"], Float32[Array, "R M"]]:
    """Returns the output of each query, in q's dtype, and its lse; 0 and -inf if it sees no key.

    Reverse-mode differentiable in q, k and v if no two rows read the same keys, as in decode; gradients are summed in float32.
    """
    return _attend(q, k, v, rows, tiling)


def attend_sparse_rows_skipping(
    q: Float[Array, "R M D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    rows: SparseRows,
    threshold: Float32[Array, "R tiles"],
    tiling: Tiling,
) -> tuple[Float[Array, "R M D"], Float32[Array, "R M"], Int32[Array, "R tiles"]]:
    """As `attend_sparse_rows`, without blocks of negligible weight; not differentiable.

    The M queries of a row form equal tiles. A tile skips a block if each of its queries that sees a key of it has its largest score
    there below its largest score so far plus `threshold` (at most 0). Also returns the number of blocks that each tile did not skip.
    """

    def chunk(_, rows, q, threshold):
        def step(i, carry):
            state, kept = carry
            source, scores = _scores(q, k, rows, i, tiling)
            needed = _needed(scores, state.maximum, threshold, tiling)
            spread = jnp.repeat(needed, q.shape[1] // threshold.shape[1], axis=1)
            scores = jnp.where(jnp.repeat(spread, tiling.block_size, axis=2), scores, -jnp.inf)
            return state.add(scores, _vectors(v, source)), kept + needed.sum(-1, dtype=jnp.int32)

        start = OnlineSoftmax.empty(*q.shape), jnp.zeros(threshold.shape, jnp.int32)
        state, kept = jax.lax.fori_loop(0, _num_steps(rows, tiling), step, start)
        out, lse = state.finish()
        return (), (out.astype(q.dtype), lse, kept)

    return _in_chunks(chunk, tiling, q, rows, threshold)[1]


def _needed(
    scores: Float32[Array, "X M W"],
    maximum: Float32[Array, "X M"],
    threshold: Float32[Array, "X tiles"],
    tiling: Tiling,
) -> Bool[Array, "X tiles blocks"]:
    """Which blocks of a step each tile of queries does not skip; `maximum` is that of each query before the step."""
    rows, tiles = threshold.shape
    largest = scores.reshape(*maximum.shape, tiling.blocks_per_step, tiling.block_size).max(-1)
    before = jax.lax.cummax(jnp.concatenate([maximum[..., None], largest[..., :-1]], axis=2), axis=2)
    before = before.reshape(rows, tiles, -1, tiling.blocks_per_step)
    largest = largest.reshape(before.shape)
    return ((largest != -jnp.inf) & ~(largest < before + threshold[..., None, None])).any(2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, rows, tiling):
    def chunk(_, rows, q):
        def step(i, state):
            source, scores = _scores(q, k, rows, i, tiling)
            return state.add(scores, _vectors(v, source))

        state = jax.lax.fori_loop(0, _num_steps(rows, tiling), step, OnlineSoftmax.empty(*q.shape))
        out, lse = state.finish()
        return (), (out.astype(q.dtype), lse)

    return _in_chunks(chunk, tiling, q, rows)[1]


def _forward(q, k, v, rows, tiling):
    out, lse = attend_sparse_rows(q, k, v, rows, tiling)
    return (out, lse), (q, k, v, rows, out, lse)


def sparse_rows_query_gradients(
    tiling: Tiling,
    q: Float[Array, "R M D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    rows: SparseRows,
    d_out: Float[Array, "R M D"],
    lse: Float32[Array, "R M"],
    inner: Float32[Array, "R M"],
) -> Float[Array, "R M D"]:
    """Gradients in q: walks the lists again and recomputes the weights from lse.

    Args:
      tiling, q, k, v, rows: as in `attend_sparse_rows`.
      d_out: gradients in its output.
      lse: its lse, finite.
      inner: sum of each query's weights times their gradients; see `inner_products`.
    """

    def chunk(_, rows, q, d_out, lse, inner):
        def step(i, d_q):
            source, _, d_scores = _score_gradients(rows, q, d_out, lse, inner, k, v, i, tiling)
            return d_q + dot("xqs,xsd->xqd", d_scores, _vectors(k, source))

        zeros = jnp.zeros(q.shape, jnp.float32)
        return (), jax.lax.fori_loop(0, _num_steps(rows, tiling), step, zeros).astype(q.dtype)

    return _in_chunks(chunk, tiling, q, rows, d_out, lse, inner)[1]


def inner_products(
    out: Float[Array, "*rows D"],
    lse: Float32[Array, "*rows"],
    d_out: Float[Array, "*rows D"],
    d_lse: Float32[Array, "*rows"],
) -> Float32[Array, "*rows"]:
    """Sum of each query's weights times their gradients, for d scores = weights * (d weights - inner).

    That is the derivative of softmax, with lse as a second output. 0 for queries that see no key.
    """
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    return jnp.where(lse > -jnp.inf, inner, 0)


def _score_gradients(
    rows: SparseRows,
    q: Float[Array, "X M D"],
    d_out: Float[Array, "X M D"],
    lse: Float32[Array, "X M"],
    inner: Float32[Array, "X M"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    step: Array,
    tiling: Tiling,
) -> tuple[Int32[Array, "X W"], Float[Array, "X M W"], Float[Array, "X M W"]]:
    """Indices of the key vectors of a step, the weights and the gradients of the scores, both in q's dtype."""
    source, scores = _scores(q, k, rows, step, tiling)
    weights = jnp.exp(scores - lse[..., None])
    d_weights = dot("xqd,xsd->xqs", d_out, _vectors(v, source))
    d_scores = jnp.where(weights > 0, tiling.scale * weights * (d_weights - inner[..., None]), 0)
    return source, weights.astype(q.dtype), d_scores.astype(q.dtype)


def _backward(
    tiling: Tiling, residuals: tuple[Array, Array, Array, SparseRows, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """Gradients for rows of which no two read the same keys: the order in which rows are added to them is then none of a GPU's choice."""
    q, k, v, rows, out, lse = residuals
    d_out, d_lse = cotangents
    seen = lse > -jnp.inf
    # Queries that see no key may hold anything, as may their cotangents: they take no part.
    q, d_out = (jnp.where(seen[..., None], x, 0) for x in (q, d_out))
    inner = inner_products(out, lse, d_out, d_lse)

    def chunk(sums, rows, q, d_out, lse, inner):
        def step(i, carry):
            d_q, d_k, d_v = carry
            source, weights, d_scores = _score_gradients(rows, q, d_out, lse, inner, k, v, i, tiling)
            d_q += dot("xqs,xsd->xqd", d_scores, _vectors(k, source))
            d_k = d_k.at[source].add(dot("xqs,xqd->xsd", d_scores, q))
            d_v = d_v.at[source].add(dot("xqs,xqd->xsd", weights, d_out))
            return d_q, d_k, d_v

        carry = jnp.zeros(q.shape, jnp.float32), *sums
        d_q, *sums = jax.lax.fori_loop(0, _num_steps(rows, tiling), step, carry)
        return tuple(sums), d_q.astype(q.dtype)

    zeros = jnp.zeros((k.size // k.shape[-1], k.shape[-1]), jnp.float32)
    sums, d_q = _in_chunks(chunk, tiling, q, rows, d_out, finite(lse), inner, carry=(zeros, zeros))
    d_k, d_v = (x.reshape(k.shape).astype(k.dtype) for x in sums)
    return jnp.where(seen[..., None], d_q, 0), d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _in_chunks(
    function: Callable[..., Any], tiling: Tiling, q: Array, rows: SparseRows, *arrays: Array, carry: Any = ()
) -> tuple[Any, Any]:
    """function(carry, rows, q, *arrays) -> (carry, results) over chunks of rows, see `scan_chunks`; with lists of whole steps."""
    rows = rows._replace(indices=jnp.pad(rows.indices, ((0, 0), (0, -rows.indices.shape[1] % tiling.blocks_per_step))))

    def run(elements: int, carry: Any, rows: SparseRows, *arrays: Array) -> Any:
        most = tiling.rows_per_chunk(elements, *q.shape[1:])
        return scan_chunks(function, carry, rows, *arrays, rows_per_chunk=most)

    return with_chunk_elements(run, carry, rows, q, *arrays)


def _num_steps(rows: SparseRows, tiling: Tiling) -> Array:
    return -(-rows.counts.max() // tiling.blocks_per_step)


def _scores(
    q: Float[Array, "X M D"], k: Float[Array, "B S K D"], rows: SparseRows, step: Array, tiling: Tiling
) -> tuple[Int32[Array, "X W"], Float32[Array, "X M W"]]:
    """Indices of the key vectors of a step, and their scores, -inf for keys that a query does not see.

    Keys that no query of a row sees may hold NaN, which a weight of 0 would not keep out of the sum of values: the first key of the
    row's list is read in their place.
    """
    b, blocks_per_step = tiling.block_size, tiling.blocks_per_step
    block = jax.lax.dynamic_slice_in_dim(rows.indices, step * blocks_per_step, blocks_per_step, axis=1)
    valid = step * blocks_per_step + jnp.arange(blocks_per_step)[None] < rows.counts[:, None]
    # Fillers may be any integers: the row's first block is read in their place, and masked.
    first = jnp.where(rows.counts[:, None] > 0, rows.indices[:, :1], 0)
    position = jnp.where(valid, block, first)[..., None] * b + jnp.arange(b)[None, None]
    seen = position < rows.limit.max(-1)[:, None, None]
    read = jnp.minimum(jnp.where(seen, position, first[..., None] * b), k.shape[1] - 1)
    source = rows.start[:, None, None] + read * k.shape[2]
    position = jnp.where(valid[..., None], position, _NOWHERE)
    source, position = (x.reshape(len(q), blocks_per_step * b) for x in (source, position))
    scores = tiling.scale * dot("xqd,xsd->xqs", q, _vectors(k, source))
    return source, jnp.where(position[:, None] < rows.limit[..., None], scores, -jnp.inf)


def _vectors(x: Float[Array, "B S K D"], source: Int32[Array, "X W"]) -> Float[Array, "X W D"]:
    return x.reshape(-1, x.shape[-1]).at[source].get(mode="clip")

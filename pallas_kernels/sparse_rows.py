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

from pallas_kernels import devices
from pallas_kernels.online_softmax import OnlineSoftmax, dot, finite

_NOWHERE = 2**30  # a key position beyond every limit
# Elements of a chunk's key tile and of its scores: the capacity of a CPU's cache; on other devices, enough to keep them busy.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**19, 2**25


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

    Reverse-mode differentiable in q, k and v; gradients are summed in float32.
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
    return _with_chunk_size(_attend_chunks_skipping, tiling, q, k, v, rows, threshold)


def _attend_chunks_skipping(tiling, chunk_elements, q, k, v, rows, threshold):
    order, chunks = _sorted_chunks(rows, tiling, chunk_elements, q, threshold)

    def chunk(operands):
        rows, q, threshold = operands

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
        return out.astype(q.dtype), lse, kept

    return _unsort(order, jax.lax.map(chunk, chunks), len(q))


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
    return _with_chunk_size(_attend_chunks, tiling, q, k, v, rows)


def _attend_chunks(tiling, chunk_elements, q, k, v, rows):
    order, chunks = _sorted_chunks(rows, tiling, chunk_elements, q)

    def chunk(operands):
        rows, q = operands

        def step(i, state):
            source, scores = _scores(q, k, rows, i, tiling)
            return state.add(scores, _vectors(v, source))

        state = jax.lax.fori_loop(0, _num_steps(rows, tiling), step, OnlineSoftmax.empty(*q.shape))
        out, lse = state.finish()
        return out.astype(q.dtype), lse

    return _unsort(order, jax.lax.map(chunk, chunks), len(q))


def _forward(q, k, v, rows, tiling):
    out, lse = attend_sparse_rows(q, k, v, rows, tiling)
    return (out, lse), (q, k, v, rows, out, lse)


def attend_sparse_rows_gradients(
    tiling: Tiling, residuals: tuple[Array, Array, Array, SparseRows, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Float[Array, "R M D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Gradients in q, k and v: walks the lists again and recomputes the weights from lse.

    Args:
      tiling: as in `attend_sparse_rows`.
      residuals: (q, k, v, rows, out, lse), arguments and results of `attend_sparse_rows`.
      cotangents: gradients in (out, lse).
    """
    q, k, v, rows, out, lse = residuals
    d_out, d_lse = cotangents
    seen = lse > -jnp.inf
    # Queries that see no key may hold anything, as may their cotangents: they take no part.
    q, d_out = (jnp.where(seen[..., None], x, 0) for x in (q, d_out))
    # d scores = weights * (d_weights - inner): the derivative of softmax, with lse as a second output.
    inner = jnp.where(seen, dot("rmd,rmd->rm", d_out, out) - d_lse, 0)
    d_q, d_k, d_v = _with_chunk_size(_gradient_chunks, tiling, q, k, v, rows, d_out, finite(lse), inner)
    return jnp.where(seen[..., None], d_q, 0), d_k, d_v


def _gradient_chunks(tiling, chunk_elements, q, k, v, rows, d_out, lse, inner):
    order, chunks = _sorted_chunks(rows, tiling, chunk_elements, q, d_out, lse, inner)

    def chunk(carry, operands):
        rows, q, d_out, lse, inner = operands

        def step(i, carry):
            d_q, d_k, d_v = carry
            source, scores = _scores(q, k, rows, i, tiling)
            weights = jnp.exp(scores - lse[..., None])
            d_weights = dot("xqd,xsd->xqs", d_out, _vectors(v, source))
            d_scores = jnp.where(weights > 0, tiling.scale * weights * (d_weights - inner[..., None]), 0).astype(
                q.dtype
            )
            d_q += dot("xqs,xsd->xqd", d_scores, _vectors(k, source))
            d_k = d_k.at[source].add(dot("xqs,xqd->xsd", d_scores, q))
            d_v = d_v.at[source].add(dot("xqs,xqd->xsd", weights.astype(q.dtype), d_out))
            return d_q, d_k, d_v

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = jax.lax.fori_loop(0, _num_steps(rows, tiling), step, (d_q, *carry))
        return tuple(carry), d_q.astype(q.dtype)

    zeros = jnp.zeros((k.size // k.shape[-1], k.shape[-1]), jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(chunk, (zeros, zeros), chunks)
    d_k, d_v = (x.reshape(k.shape).astype(k.dtype) for x in (d_k, d_v))
    return _unsort(order, d_q, len(q)), d_k, d_v


def _backward(tiling, residuals, cotangents):
    return *attend_sparse_rows_gradients(tiling, residuals, cotangents), None


_attend.defvjp(_forward, _backward)


def _with_chunk_size(function: Callable[..., Any], tiling: Tiling, *operands: Any) -> Any:
    """Calls a function of (tiling, elements of a chunk, operands) for the device, which may be known only at lowering."""
    if devices.has_only_cpus():
        return function(tiling, _CPU_ELEMENTS, *operands)
    on_cpus, on_others = (functools.partial(function, tiling, n) for n in (_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS))
    return jax.lax.platform_dependent(*operands, cpu=on_cpus, default=on_others)


def _sorted_chunks(
    rows: SparseRows, tiling: Tiling, chunk_elements: int, q: Array, *others: Array
) -> tuple[Array, Any]:
    """Sorts rows by the length of their lists and splits them into chunks [n, X, ...]; the last chunk is padded."""
    rows = rows._replace(indices=jnp.pad(rows.indices, ((0, 0), (0, -rows.indices.shape[1] % tiling.blocks_per_step))))
    size = min(len(q), tiling.rows_per_chunk(chunk_elements, *q.shape[1:]))
    order = jnp.pad(jnp.argsort(rows.counts), (0, -len(q) % size), constant_values=len(q))
    counts = rows.counts.at[order].get(mode="fill", fill_value=0)  # padding has empty lists
    rows, *arrays = jax.tree.map(lambda x: x.at[order].get(mode="clip"), (rows, q, *others))
    operands = (rows._replace(counts=counts), *arrays)
    return order, jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), operands)


def _unsort(order: Array, chunked: Any, num_rows: int) -> Any:
    inverse = jnp.argsort(order)[:num_rows]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[inverse], chunked)


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

"""What the kernels of `block_sparse_attention` share: which queries a warpgroup works on, and the list of key blocks they read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic.flash_tiles import QUERIES, ROWS, Softmax, i32, mask


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that a kernel is compiled for: B, T, H, D, K, Hs, Tb and b."""

    batch: int
    num_queries: int
    heads: int
    head_dim: int
    kv_heads: int
    lists: int
    rows: int
    block_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def outputs(self, dtype: Any, lse_queries: int) -> list[jax.ShapeDtypeStruct]:
        """Of both kernels: out [B, T, H, D] and lse [B, H, lse_queries].

        Queries beyond the last are not written to `out`, but they would be to `lse`: there the copy engine knows no bounds.
        """
        queries = self.batch, self.num_queries, self.heads, self.head_dim
        lse = self.batch, self.heads, lse_queries
        return [jax.ShapeDtypeStruct(queries, dtype), jax.ShapeDtypeStruct(lse, jnp.float32)]

    def place(self, cta: Array, per_head: int, per_group: int) -> tuple[Array, Array, Array, Array]:
        """(sequence, key/value head, place in its group, place among the head's query blocks) of a CTA.

        All work of a key/value head is contiguous in time, so that its keys and values stay in L2; the last query blocks, whose
        lists are longest, start first.
        """
        rest, in_group = lax.div(cta, i32(per_group)), lax.rem(cta, i32(per_group))
        rest, in_head = lax.div(rest, i32(per_head)), lax.rem(rest, i32(per_head))
        return lax.div(rest, i32(self.kv_heads)), lax.rem(rest, i32(self.kv_heads)), in_group, per_head - 1 - in_head


@dataclasses.dataclass(frozen=True)
class Queries:
    """64 queries of one head: what one warpgroup works on.

    Attributes:
      sequence, head, kv_head: which.
      start: first query.
      list_row: which of the head's lists they read; may lie beyond the last one.
    """

    sequence: Array
    head: Array
    kv_head: Array
    start: Array
    list_row: Array

    def of(self, ref: Any) -> Any:
        """Their part of q or of the output."""
        return ref.at[self.sequence, pl.ds(self.start, QUERIES), self.head]


@dataclasses.dataclass(frozen=True)
class Row:
    """The list of key blocks that some queries read, and what they may see.

    Attributes:
      entry: `entry(i)` is block number i on the list, for i below `width`.
      width: N.
      count: blocks on the list; 0 if the sequence ends before the queries, or the list does not exist.
      position: of the first query, in tokens from the first key.
      length: keys of the sequence.
    """

    entry: Callable[[Array | int], Array]
    width: int
    count: Array
    position: Array
    length: Array

    @classmethod
    def read(cls, shape: Shape, refs: "Inputs", queries: Queries) -> "Row":
        sequence, list_head = queries.sequence, lax.div(queries.head * shape.lists, i32(shape.heads))
        list_row = jnp.minimum(queries.list_row, shape.rows - 1)
        count = refs.counts[sequence, list_head, list_row]
        offset, length = refs.offsets[sequence, 0], refs.offsets[sequence, 1]
        exists = (queries.list_row < shape.rows) & (offset + list_row * shape.block_size < length)

        def entry(i: Array | int) -> Array:
            return refs.indices[sequence, list_head, list_row, i]

        width = refs.indices.shape[-1]
        return cls(entry, width, jnp.where(exists, count, 0), offset + queries.start, length)

    def sees_all(self, block: Array, block_size: int) -> Array:
        """Whether every query sees all of a key block; the first query sees the fewest keys."""
        return (block + 1) * block_size <= self.position + 1

    def mask(self, scores: Array, start: Array) -> Array:
        """-inf for the keys that a query must not see; the first column is the key at position `start`."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS)
        visible = jnp.minimum(query + 1, self.length) - start
        return mask(scores, visible)

    def finish(self, state: Softmax) -> tuple[Array, Array]:
        """Output and lse; 0 and -inf for queries that see no key or lie beyond the sequence."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS)
        return state.finish(query < self.length)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """References to the kernel's inputs in global memory; `offsets` [B, 2] holds query_offset and length."""

    q: Any
    k: Any
    v: Any
    counts: Any
    indices: Any
    offsets: Any


def write_results(
    queries: Queries, row: Row, state: Softmax, q_tile: Any, lse_row: Any, out_ref: Any, lse_ref: Any
) -> None:
    """Sends the results off through shared memory; the query tile is not needed any more."""
    out, lse = row.finish(state)
    q_tile[...] = out.astype(q_tile.dtype)
    lse_row[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, queries.of(out_ref))
    plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[queries.sequence, queries.head, pl.ds(queries.start, QUERIES)])
    plgpu.wait_smem_to_gmem(0)

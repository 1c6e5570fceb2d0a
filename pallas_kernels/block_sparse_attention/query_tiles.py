"""What the kernels of `block_sparse_attention` share: the queries of a warpgroup and the list of key blocks that they read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic.flash_tiles import QUERIES, ROW_VECTOR, Softmax, i32, mask
from pallas_kernels.mosaic.votes import any_row


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that a kernel is compiled for: B, T, H, D, K, Hs, Tb and b, whether sequences may end before the keys do, whether blocks
    are skipped, and T before it was padded for TMA."""

    batch: int
    num_queries: int
    heads: int
    head_dim: int
    kv_heads: int
    lists: int
    rows: int
    block_size: int
    padded: bool
    skips: bool
    real_queries: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the kernel's inputs, see `InputRefs`."""
        optional = ("edge",) * self.padded + ("log2_thresholds",) * self.skips
        return "q", "k", "v", "counts", "indices", "offsets", *optional

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def outputs(self, dtype: Any, lse_queries: int) -> list[jax.ShapeDtypeStruct]:
        """Results of both kernels: out [B, T, H, D], lse [B, H, lse_queries] and, if blocks are skipped, kept [B, H, lse_queries / 64].

        TMA clips writes to `out` at T. It cannot clip those to `lse`, whose last axis is therefore a multiple of a CTA's queries.
        """
        queries = self.batch, self.num_queries, self.heads, self.head_dim
        lse = self.batch, self.heads, lse_queries
        results = [jax.ShapeDtypeStruct(queries, dtype), jax.ShapeDtypeStruct(lse, jnp.float32)]
        if self.skips:
            results.append(jax.ShapeDtypeStruct((*lse[:2], lse_queries // QUERIES), jnp.int32))
        return results

    def work_of(self, cta: Array, per_head: int, per_group: int) -> tuple[Array, Array, Array, Array]:
        """(sequence, key/value head, index in its group, index among the head's query blocks) of a CTA.

        CTAs of a key/value head are adjacent, so that its keys and values stay in L2. The last query blocks, whose lists are longest,
        start first.
        """
        rest, in_group = lax.div(cta, i32(per_group)), lax.rem(cta, i32(per_group))
        rest, in_head = lax.div(rest, i32(per_head)), lax.rem(rest, i32(per_head))
        return lax.div(rest, i32(self.kv_heads)), lax.rem(rest, i32(self.kv_heads)), in_group, per_head - 1 - in_head


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """64 queries of one head, the work of one warpgroup.

    Attributes:
      sequence, head, kv_head: indices of their sequence, query head and key/value head.
      start: index of the first query.
      list_row: index of their list among those of the head; may lie beyond the last one.
    """

    sequence: Array
    head: Array
    kv_head: Array
    start: Array
    list_row: Array

    def of(self, ref: Any) -> Any:
        """These queries' part of q or of the output."""
        return ref.at[self.sequence, pl.ds(self.start, QUERIES), self.head]


@dataclasses.dataclass(frozen=True)
class BlockList:
    """The list of key blocks that a query tile reads, and the keys that its queries see.

    Attributes:
      entry: `entry(i)` is the number of block i of the list, for i below `width`.
      width: N.
      count: blocks on the list; 0 if the sequence ends before the queries, or the list does not exist.
      position: position of the first query, in tokens from the first key.
      length: keys of the sequence.
    """

    entry: Callable[[Array | int], Array]
    width: int
    count: Array
    position: Array
    length: Array

    @classmethod
    def read(cls, sizes: Sizes, refs: "InputRefs", queries: QueryTile) -> "BlockList":
        sequence, list_head = queries.sequence, lax.div(queries.head * sizes.lists, i32(sizes.heads))
        list_row = jnp.minimum(queries.list_row, sizes.rows - 1)
        count = refs.counts[sequence, list_head, list_row]
        offset, length = refs.offsets[sequence, 0], refs.offsets[sequence, 1]
        exists = (queries.list_row < sizes.rows) & (offset + list_row * sizes.block_size < length)

        def entry(i: Array | int) -> Array:
            return refs.indices[sequence, list_head, list_row, i]

        width = refs.indices.shape[-1]
        return cls(entry, width, jnp.where(exists, count, 0), offset + queries.start, length)

    def sees_all(self, block: Array, block_size: int) -> Array:
        """Whether every query sees all of a key block: the first query does, which sees the fewest keys."""
        return (block + 1) * block_size <= self.position + 1

    def mask(self, scores: Array, start: Array) -> Array:
        """Scores with -inf for the keys that a query does not see; the first column is the key at position `start`."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        visible = jnp.minimum(query + 1, self.length) - start
        return mask(scores, visible)

    def finish(self, state: Softmax) -> tuple[Array, Array]:
        """Output and lse; 0 and -inf for queries that see no key or lie beyond the sequence."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        return state.finish(query < self.length)


@dataclasses.dataclass(frozen=True)
class InputRefs:
    """The kernel's inputs in global memory.

    Attributes:
      q, k, v, counts, indices: see api.py.
      offsets: [B, 2 or 3], query_offset, length and, if sequences read rows of a cache, the row of k and v.
      edge: [B, b, K, D], the values of the block that holds a sequence's last key, with zeros beyond that key; None where every
        sequence has as many keys as the array.
      log2_thresholds: [H], log2(lambda); None where no block is skipped.
    """

    q: Any
    k: Any
    v: Any
    counts: Any
    indices: Any
    offsets: Any
    edge: Any = None
    log2_thresholds: Any = None

    @classmethod
    def of(cls, sizes: Sizes, arguments: tuple[Any, ...]) -> tuple["InputRefs", tuple[Any, ...]]:
        """The inputs among a kernel's arguments, and the arguments after them."""
        names = sizes.inputs
        return cls(**dict(zip(names, arguments[: len(names)], strict=True))), arguments[len(names) :]

    def cache_row(self, sequence: Array) -> Array:
        """The row of k and v that a sequence reads."""
        return self.offsets[sequence, 2] if self.offsets.shape[1] > 2 else sequence

    def load_values(self, queries: QueryTile, block: Array, blocks: BlockList, target: Any, barrier: Any) -> None:
        """Starts the copy of a block of values.

        Beyond the sequence values may be NaN, which a weight of 0 would not keep out of a product: there, `edge` is read.
        """
        b, sequence, head = target.shape[0], queries.sequence, queries.kv_head

        def load_inner() -> None:
            plgpu.copy_gmem_to_smem(self.v.at[self.cache_row(sequence), pl.ds(block * b, b), head], target, barrier)

        if self.edge is None:
            load_inner()
            return
        end = (block + 1) * b
        pl.when(end <= blocks.length)(load_inner)

        @pl.when(end > blocks.length)
        def _():
            plgpu.copy_gmem_to_smem(self.edge.at[sequence, :, head], target, barrier)


@dataclasses.dataclass(frozen=True)
class Skipping:
    """Decides which blocks a query tile skips; see api.py.

    Attributes:
      log2_threshold: log2(lambda), finite and at most 0.
      num_queries: leading rows of the tile that are queries of the sequence; what the others hold decides nothing.
      interpret: settings of JAX's interpreter, None on a GPU.
    """

    log2_threshold: Array
    num_queries: Array
    interpret: Any

    @classmethod
    def read(cls, sizes: Sizes, refs: InputRefs, queries: QueryTile, blocks: BlockList, interpret: Any) -> "Skipping":
        num_queries = jnp.minimum(sizes.real_queries - queries.start, blocks.length - blocks.position)
        return cls(refs.log2_thresholds[queries.head], num_queries, interpret)

    def needs(self, largest: Array, maximum: Array) -> Array:
        """1 if any query needs a block, otherwise 0; the same in every thread of the warpgroup.

        Args:
          largest: [64], the largest score of each query in the block, in base 2; -inf where it sees no key.
          maximum: [64], that in the blocks before.
        """
        row = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        # The threshold and the first maximum are finite: -inf lies below their sum, and NaN does not.
        needed = jnp.where(largest < maximum + self.log2_threshold, 0, 1)
        return any_row(jnp.where(row < self.num_queries, needed, 0), self.interpret)


def write_results(
    queries: QueryTile,
    blocks: BlockList,
    state: Softmax,
    q_tile: Any,
    lse_row: Any,
    result_refs: Sequence[Any],
    kept: Array | None = None,
) -> None:
    """Writes the results through shared memory, the output through the query tile, which is no longer needed."""
    out_ref, lse_ref, *kept_refs = result_refs
    out, lse = blocks.finish(state)
    q_tile[...] = out.astype(q_tile.dtype)
    lse_row[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, queries.of(out_ref))
    plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[queries.sequence, queries.head, pl.ds(queries.start, QUERIES)])
    for kept_ref in kept_refs:
        kept_ref[queries.sequence, queries.head, lax.div(queries.start, i32(QUERIES))] = kept
    plgpu.wait_smem_to_gmem(0)

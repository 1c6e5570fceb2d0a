"""The warp-specialized kernel of `block_sparse_attention`: see README.md beside this."""

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse_attention.query_tiles import (
    BlockList,
    InputRefs,
    QueryTile,
    Sizes,
    Skipping,
    write_results,
)
from pallas_kernels.mosaic.flash_tiles import MATRIX, QUERIES, ROW_VECTOR, Rings, Softmax, i32, tile


class Sharing(enum.Enum):
    """Which lists the two consumer warpgroups walk."""

    NONE = "each its own, those of two adjacent query blocks"
    HEADS = "one list, shared by two query heads of a group"
    QUERIES = "one list over 128-token blocks, shared by the halves of a query block"


@dataclasses.dataclass(frozen=True)
class WarpSpecialized:
    """Two consumer warpgroups compute on tiles of 128 keys while a producer warpgroup loads them into ring buffers.

    Attributes:
      sharing: which lists the consumers share, and with them the ring buffers.
      k_stages, v_stages: tiles in each ring buffer.
      queries_in_registers: whether the query tile stays in registers, which leaves shared-memory bandwidth to the keys.
    """

    sharing: Sharing
    k_stages: int = 2
    v_stages: int = 2
    queries_in_registers: bool = True

    @property
    def rings(self) -> int:
        return 2 if self.sharing is Sharing.NONE else 1

    @property
    def entries(self) -> int:
        """List entries that make a tile of 128 keys."""
        return 1 if self.sharing is Sharing.QUERIES else 2


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory.

    Attributes:
      q_tiles: [2, 64, D], one per consumer, also the staging buffers of the outputs.
      lse_rows: [2, 64].
      q_ready: barriers of the copies into the query tiles.
      rings: the ring buffers of all consumers, one after the other.
    """

    q_tiles: Any
    lse_rows: Any
    q_ready: Any
    rings: Rings


def warp_specialized_kernel(sizes: Sizes, config: WarpSpecialized, c: float, interpret: Any, dtype: Any) -> Callable:
    b, entries, rings = sizes.block_size, config.entries, config.rings
    consumers = 2
    width = entries * b  # keys of a tile
    match config.sharing:
        case Sharing.NONE:
            per_head, per_group, per_cta = -(-sizes.rows // consumers), sizes.group, consumers * QUERIES
        case Sharing.HEADS:
            per_head, per_group, per_cta = sizes.rows, sizes.group // consumers, QUERIES
        case Sharing.QUERIES:
            per_head, per_group, per_cta = sizes.rows, sizes.group, consumers * QUERIES

    def queries_of(consumer: Array) -> QueryTile:
        sequence, kv_head, in_group, place = sizes.work_of(lax.axis_index("cta"), per_head, per_group)
        list_row, start = place, place * b
        match config.sharing:
            case Sharing.NONE:
                list_row = place * consumers + consumer
                start = list_row * QUERIES
            case Sharing.HEADS:
                in_group = in_group * consumers + consumer
            case Sharing.QUERIES:
                start += consumer * QUERIES
        return QueryTile(sequence, kv_head * sizes.group + in_group, kv_head, start, list_row)

    def num_tiles(blocks: BlockList) -> Array:
        """At least one, so that the loops always have a first tile; that of an empty list is masked as a whole."""
        return jnp.maximum(lax.div(blocks.count + (entries - 1), i32(entries)), 1)

    def tile_entries(blocks: BlockList, t: Array) -> list[Array]:
        """Block numbers of a tile. A missing entry repeats the one before it, or block 0."""
        numbers = [jnp.where(blocks.count > 0, blocks.entry(t * entries), 0)]
        for i in range(1, entries):
            at = t * entries + i
            # Clamped to the width and not to the count, so that no address waits for the count.
            numbers.append(jnp.where(at < blocks.count, blocks.entry(jnp.minimum(at, blocks.width - 1)), numbers[0]))
        return numbers

    def last_entries(blocks: BlockList) -> tuple[Array, Array, Array]:
        """Length of the list and its last two entries."""
        last, before = (blocks.entry(jnp.maximum(blocks.count - i, 0)) for i in (1, 2))
        return blocks.count, last, before

    def fully_visible(blocks: BlockList, last_entries: tuple[Array, Array, Array]) -> Array:
        """How many leading entries every query sees in full. Lists ascend, so that only entries at the end need a mask."""

        def hidden(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[0] > 0) & ~blocks.sees_all(carry[1], b)

        def shorten(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return carry[0] - 1, carry[2], blocks.entry(jnp.maximum(carry[0] - 3, 0))

        return lax.while_loop(hidden, shorten, last_entries)[0]

    def consume(consumer: Array, refs: InputRefs, result_refs: Sequence[Any], scratch: _Scratch) -> None:
        q_tile, q_ready = scratch.q_tiles.at[consumer], scratch.q_ready.at[consumer]
        queries = queries_of(consumer)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, q_ready)
        blocks = BlockList.read(sizes, refs, queries)
        tiles = num_tiles(blocks)
        last = last_entries(blocks)  # read early, since it comes from L2
        plgpu.barrier_wait(q_ready)
        # Branches around blocks that may be skipped take the registers.
        in_registers = config.queries_in_registers and not sizes.skips and not interpret
        q = q_tile[...] if in_registers else q_tile
        ring = consumer if rings == consumers else i32(0)

        def stage(t: Array, stages: int) -> Array:
            return ring * stages + lax.rem(t, i32(stages))

        def mask(scores: Array, t: Array) -> Array:
            parts = []
            for i, block in enumerate(tile_entries(blocks, t)):
                missing = t * entries + i >= blocks.count
                # A position beyond the sequence hides a repeated block.
                start = jnp.where(missing, blocks.length, block * b)
                parts.append(blocks.mask(scores[:, i * b : (i + 1) * b], start))
            return parts[0] if entries == 1 else jnp.concatenate(parts, axis=1)

        def weigh(t: Array, masked: bool, scores: Array, state: Softmax) -> tuple[Array, Array, Array, Array]:
            scores = mask(scores, t) if masked else scores
            maximum, total, weights, factor = state.add(scores, c)
            return maximum, total, weights.astype(dtype), factor

        def step(t: Array, carry: tuple[Softmax, Array], *, masked: bool) -> tuple[Softmax, Array]:
            stages = stage(t, config.k_stages), stage(t - 1, config.v_stages)
            return scratch.rings.step(q, stages, carry, functools.partial(weigh, t, masked), interpret)

        def weigh_needed(t: Array, masked: bool, scores: Array, state: Softmax, weights: Array) -> tuple:
            """(maximum, total, weights, factor on `out`, blocks that are not skipped)."""
            scores = mask(scores, t) if masked else scores
            parts = [scores[:, i * b : (i + 1) * b] for i in range(entries)] if entries > 1 else [scores]
            largest = [part.max(axis=1) for part in parts]
            needed, before = [], state.maximum
            for x in largest:
                needed.append(skipping.needs(x * c, before))
                before = jnp.maximum(before, x * c)
            count = functools.reduce(operator.add, needed)

            def add() -> tuple[Array, Array, Array, Array]:
                left = scores
                if entries > 1:
                    left = [part + jnp.where(x > 0, 0.0, -jnp.inf) for x, part in zip(needed, parts, strict=True)]
                    left = jnp.concatenate(left, axis=1)
                maximum, total, weights, factor = state.add(left, c, functools.reduce(jnp.maximum, largest))
                return maximum, total, weights.astype(dtype), factor

            def skip() -> tuple[Array, Array, Array, Array]:
                one = plgpu.layout_cast(jnp.full((QUERIES,), 1, jnp.float32), ROW_VECTOR)
                return state.maximum, state.total, weights, one

            return *lax.cond(count > 0, add, skip), count

        def skipping_step(t: Array, carry: tuple, *, masked: bool) -> tuple:
            *before, kept = carry
            stages = stage(t, config.k_stages), stage(jnp.maximum(t - 1, 0), config.v_stages)
            add = functools.partial(weigh_needed, t, masked)
            state, weights, count = scratch.rings.skipping_step(q, stages, tuple(before), t > 0, add, interpret)
            return state, weights, count, kept + count

        start = i32(0)
        if sizes.skips:
            skipping = Skipping.read(sizes, refs, queries, blocks, interpret)
            full = lax.div(fully_visible(blocks, last), i32(entries))
            none = plgpu.layout_cast(jnp.full((QUERIES, width), 0, dtype), MATRIX)
            empty = Softmax.empty(sizes.head_dim), none, start, start
            seen = lax.fori_loop(start, full, functools.partial(skipping_step, masked=False), empty)
            *carry, kept = lax.fori_loop(full, tiles, functools.partial(skipping_step, masked=True), seen)
            state = scratch.rings.skipping_last(stage(tiles - 1, config.v_stages), tuple(carry), interpret)
            write_results(queries, blocks, state, q_tile, scratch.lse_rows.at[consumer], result_refs, kept)
            return
        first = functools.partial(weigh, start, True)
        carry = scratch.rings.first(q, stage(start, config.k_stages), sizes.head_dim, first)
        full = lax.div(fully_visible(blocks, last), i32(entries))
        carry = lax.fori_loop(i32(1), full, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(jnp.maximum(full, 1), tiles, functools.partial(step, masked=True), carry)
        state = scratch.rings.last(stage(tiles - 1, config.v_stages), carry, interpret)
        write_results(queries, blocks, state, q_tile, scratch.lse_rows.at[consumer], result_refs)

    def produce(ring: int, refs: InputRefs, rings: Rings) -> None:
        queries = queries_of(i32(ring))
        blocks = BlockList.read(sizes, refs, queries)
        tiles, row = num_tiles(blocks), refs.cache_row(queries.sequence)

        @pl.loop(i32(0), tiles)
        def _(t: Array) -> None:
            numbers = tile_entries(blocks, t)  # before the waits, since it comes from L2

            def load_keys(block: Array, part: Any, ready: Any) -> None:
                keys = refs.k.at[row, pl.ds(block * b, b), queries.kv_head]
                plgpu.copy_gmem_to_smem(keys, part, ready)

            def load_values(block: Array, part: Any, ready: Any) -> None:
                refs.load_values(queries, block, blocks, part, ready)

            def fill(load: Callable[..., None], target: Any, ready: Any, free: Any, stages: int) -> None:
                at = ring * stages + lax.rem(t, i32(stages))
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
                for i, block in enumerate(numbers):
                    load(block, target.at[at] if entries == 1 else target.at[at, pl.ds(i * b, b)], ready.at[at])

            fill(load_keys, rings.k_tiles, rings.k_ready, rings.k_free, config.k_stages)
            fill(load_values, rings.v_tiles, rings.v_ready, rings.v_free, config.v_stages)

        if interpret:
            # The interpreter requires a wait for every completed phase of a barrier.
            for free, stages in ((rings.k_free, config.k_stages), (rings.v_free, config.v_stages)):

                @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
                def _(t: Array, free: Any = free, stages: int = stages) -> None:
                    plgpu.barrier_wait(free.at[ring * stages + lax.rem(t, i32(stages))])

    def kernel(*arguments: Any) -> None:
        refs, rest = InputRefs.of(sizes, arguments)
        result_refs, scratch_refs = rest[: 3 if sizes.skips else 2], rest[3 if sizes.skips else 2 :]
        q_tiles, k_tiles, v_tiles, lse_rows, q_ready, *barriers = scratch_refs
        scratch = _Scratch(q_tiles, lse_rows, q_ready, Rings(k_tiles, v_tiles, *barriers))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(240, action="increase")
            consume(warpgroup, refs, result_refs, scratch)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            if rings == 1:
                produce(0, refs, scratch.rings)
            else:
                # One warp per ring buffer: in a single loop the rings would wait for each other.

                @plgpu.warp_map
                def _(warp: Array) -> None:
                    for ring in range(rings):
                        pl.when(warp == ring)(functools.partial(produce, ring, refs, scratch.rings))

    readers = consumers // rings
    stages = rings * config.k_stages, rings * config.v_stages
    return plgpu.kernel(
        kernel,
        out_type=sizes.outputs(dtype, per_head * per_cta),
        scratch_types=[
            tile(consumers, QUERIES, sizes.head_dim, dtype),
            *(tile(number, width, sizes.head_dim, dtype) for number in stages),
            plgpu.SMEM((consumers, QUERIES), jnp.float32),
            plgpu.Barrier(num_barriers=consumers),
            *(plgpu.Barrier(num_arrivals=entries, num_barriers=number) for number in stages),
            *(plgpu.Barrier(num_arrivals=readers, num_barriers=number) for number in stages),
        ],
        grid=(sizes.batch * sizes.kv_heads * per_head * per_group,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )

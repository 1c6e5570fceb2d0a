"""The ring kernel of `block_sparse_attention`: see README.md beside this."""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse_attention.tile import Inputs, Queries, Row, Shape, write_results
from pallas_kernels.mosaic.flash_tiles import QUERIES, Rings, Softmax, i32, tile


class Sharing(enum.Enum):
    """Whose lists the two consumer warpgroups of the ring kernel walk."""

    NONE = "each its own, of two adjacent query blocks"
    HEADS = "one list, shared by two query heads of a group"
    QUERIES = "one list of 128-token blocks, shared by the halves of a query block"


@dataclasses.dataclass(frozen=True)
class Ring:
    """Two warpgroups compute on tiles of 128 keys while a third one loads them into rings.

    Attributes:
      sharing: of lists, and so of rings.
      k_slots, v_slots: tiles in each ring.
      queries_in_registers: keep the query tile there; leaves shared-memory bandwidth to the keys.
    """

    sharing: Sharing
    k_slots: int = 2
    v_slots: int = 2
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
    """Shared memory of the ring kernel.

    Attributes:
      q_tiles: [2, 64, D], one per consumer; outputs leave through it.
      lse_rows: [2, 64].
      q_ready: barriers of the copies into the query tiles.
      rings: of all consumers, one ring after the other.
    """

    q_tiles: Any
    lse_rows: Any
    q_ready: Any
    rings: Rings


def ring_kernel(shape: Shape, config: Ring, c: float, interpret: Any, dtype: Any) -> Callable:
    b, entries, rings = shape.block_size, config.entries, config.rings
    consumers = 2
    width = entries * b  # keys of a tile
    match config.sharing:
        case Sharing.NONE:
            per_head, per_group, per_cta = -(-shape.rows // consumers), shape.group, consumers * QUERIES
        case Sharing.HEADS:
            per_head, per_group, per_cta = shape.rows, shape.group // consumers, QUERIES
        case Sharing.QUERIES:
            per_head, per_group, per_cta = shape.rows, shape.group, consumers * QUERIES

    def queries_of(consumer: Array) -> Queries:
        sequence, kv_head, in_group, place = shape.place(lax.axis_index("cta"), per_head, per_group)
        list_row, start = place, place * b
        match config.sharing:
            case Sharing.NONE:
                list_row = place * consumers + consumer
                start = list_row * QUERIES
            case Sharing.HEADS:
                in_group = in_group * consumers + consumer
            case Sharing.QUERIES:
                start += consumer * QUERIES
        return Queries(sequence, kv_head * shape.group + in_group, kv_head, start, list_row)

    def num_tiles(row: Row) -> Array:
        """A row without blocks takes one tile, all of it masked: so the loops have a first tile in any case."""
        return jnp.maximum(lax.div(row.count + (entries - 1), i32(entries)), 1)

    def tile_entries(row: Row, t: Array) -> list[Array]:
        """Block numbers of a tile. In the place of an entry that is missing, the one before it is read again, or block 0."""
        blocks = [jnp.where(row.count > 0, row.entry(t * entries), 0)]
        for i in range(1, entries):  # no address waits for the count
            at = t * entries + i
            blocks.append(jnp.where(at < row.count, row.entry(jnp.minimum(at, row.width - 1)), blocks[0]))
        return blocks

    def last_entries(row: Row) -> tuple[Array, Array, Array]:
        """The list's length and its last two entries."""
        last, before = (row.entry(jnp.maximum(row.count - i, 0)) for i in (1, 2))
        return row.count, last, before

    def fully_visible(row: Row, last_entries: tuple[Array, Array, Array]) -> Array:
        """How many entries, from the first on, every query sees in full. Lists ascend, so the rest is at the end."""

        def hidden(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[0] > 0) & ~row.sees_all(carry[1], b)

        def shorten(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return carry[0] - 1, carry[2], row.entry(jnp.maximum(carry[0] - 3, 0))

        return lax.while_loop(hidden, shorten, last_entries)[0]

    def consume(consumer: Array, refs: Inputs, out_ref: Any, lse_ref: Any, scratch: _Scratch) -> None:
        q_tile, q_ready = scratch.q_tiles.at[consumer], scratch.q_ready.at[consumer]
        queries = queries_of(consumer)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, q_ready)
        row = Row.read(shape, refs, queries)
        tiles = num_tiles(row)
        last = last_entries(row)  # read early: it takes a trip to L2
        plgpu.barrier_wait(q_ready)
        q = q_tile[...] if config.queries_in_registers and not interpret else q_tile
        ring = consumer if rings == consumers else i32(0)

        def slot(t: Array, slots: int) -> Array:
            return ring * slots + lax.rem(t, i32(slots))

        def mask(scores: Array, t: Array) -> Array:
            parts = []
            for i, block in enumerate(tile_entries(row, t)):
                missing = t * entries + i >= row.count
                start = jnp.where(missing, row.length, block * b)  # beyond the end no key is visible
                parts.append(row.mask(scores[:, i * b : (i + 1) * b], start))
            return parts[0] if entries == 1 else jnp.concatenate(parts, axis=1)

        def weigh(t: Array, masked: bool, scores: Array, state: Softmax) -> tuple[Array, Array, Array, Array]:
            scores = mask(scores, t) if masked else scores
            maximum, total, weights, factor = state.add(scores, c)
            return maximum, total, weights.astype(dtype), factor

        def step(t: Array, carry: tuple[Softmax, Array], *, masked: bool) -> tuple[Softmax, Array]:
            slots = slot(t, config.k_slots), slot(t - 1, config.v_slots)
            return scratch.rings.step(q, slots, carry, functools.partial(weigh, t, masked), interpret)

        start = i32(0)
        first = functools.partial(weigh, start, True)
        carry = scratch.rings.first(q, slot(start, config.k_slots), shape.head_dim, first)
        full = lax.div(fully_visible(row, last), i32(entries))
        carry = lax.fori_loop(i32(1), full, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(jnp.maximum(full, 1), tiles, functools.partial(step, masked=True), carry)
        state = scratch.rings.last(slot(tiles - 1, config.v_slots), carry, interpret)
        write_results(queries, row, state, q_tile, scratch.lse_rows.at[consumer], out_ref, lse_ref)

    def produce(ring: int, refs: Inputs, rings: Rings) -> None:
        queries = queries_of(i32(ring))
        row = Row.read(shape, refs, queries)
        tiles = num_tiles(row)

        @pl.loop(i32(0), tiles)
        def _(t: Array) -> None:
            blocks = tile_entries(row, t)  # before the waits: it takes a trip to L2

            def fill(source: Any, target: Any, ready: Any, free: Any, slots: int) -> None:
                at = ring * slots + lax.rem(t, i32(slots))
                pl.when(t >= slots)(lambda: plgpu.barrier_wait(free.at[at]))
                for i, block in enumerate(blocks):
                    part = target.at[at] if entries == 1 else target.at[at, pl.ds(i * b, b)]
                    keys = source.at[queries.sequence, pl.ds(block * b, b), queries.kv_head]
                    plgpu.copy_gmem_to_smem(keys, part, ready.at[at])

            fill(refs.k, rings.k_tiles, rings.k_ready, rings.k_free, config.k_slots)
            fill(refs.v, rings.v_tiles, rings.v_ready, rings.v_free, config.v_slots)

        if interpret:  # which insists that a completed phase is seen by someone
            for free, slots in ((rings.k_free, config.k_slots), (rings.v_free, config.v_slots)):

                @pl.loop(jnp.maximum(tiles - slots, 0), tiles)
                def _(t: Array, free: Any = free, slots: int = slots) -> None:
                    plgpu.barrier_wait(free.at[ring * slots + lax.rem(t, i32(slots))])

    def kernel(q_ref, k_ref, v_ref, counts, indices, offsets, out_ref, lse_ref, *scratch_refs):
        refs = Inputs(q_ref, k_ref, v_ref, counts, indices, offsets)
        q_tiles, k_tiles, v_tiles, lse_rows, q_ready, *barriers = scratch_refs
        scratch = _Scratch(q_tiles, lse_rows, q_ready, Rings(k_tiles, v_tiles, *barriers))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(240, action="increase")
            consume(warpgroup, refs, out_ref, lse_ref, scratch)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            if rings == 1:
                produce(0, refs, scratch.rings)
            else:  # one warp per ring: in a single loop the rings would wait for each other

                @plgpu.warp_map
                def _(warp: Array) -> None:
                    for ring in range(rings):
                        pl.when(warp == ring)(functools.partial(produce, ring, refs, scratch.rings))

    readers = consumers // rings
    slots = rings * config.k_slots, rings * config.v_slots
    return plgpu.kernel(
        kernel,
        out_type=shape.outputs(dtype, per_head * per_cta),
        scratch_types=[
            tile(consumers, QUERIES, shape.head_dim, dtype),
            *(tile(number, width, shape.head_dim, dtype) for number in slots),
            plgpu.SMEM((consumers, QUERIES), jnp.float32),
            plgpu.Barrier(num_barriers=consumers),
            *(plgpu.Barrier(num_arrivals=entries, num_barriers=number) for number in slots),
            *(plgpu.Barrier(num_arrivals=readers, num_barriers=number) for number in slots),
        ],
        grid=(shape.batch * shape.kv_heads * per_head * per_group,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )

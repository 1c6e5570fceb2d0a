"""Rows that are spread over a warp each: lists that warps write, and loops that they leave, independently of each other.

Pallas has no ballots, no stores to computed addresses, and no loops that end at different times in the warps of a warpgroup, so these
are written in MLIR. JAX's interpreter does not run MLIR: there, array operations take their place.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, nvvm, vector
from jaxtyping import Array, Bool, Float32, Int32

WARPS = 4
LANES = 32

# A tile of 4 rows: each warp holds one row, each lane every 32nd column of it, in ascending order.
ROW_PER_WARP = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
ROW_VECTOR = ROW_PER_WARP.reduce(1)  # one element per row, in every lane of its warp
SCALAR = plgpu.Layout.WG_SPLAT(())


def own_row(rows: Int32[Array, "4"], interpreted: bool) -> Int32[Array, ""]:
    """The element of the warp's own row, as a scalar for a branch or a loop, which warps then take independently.

    In JAX's interpreter it is the largest of the elements. The branch or loop must not contain barriers between warps.
    """
    if interpreted:
        return jnp.max(rows)
    own = plgpu.inline_mgpu(arg_types=(ROW_VECTOR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    return own(_own_row)(rows)


def drop_repeats(
    x: Float32[Array, "4 W"], value: Float32[Array, "4"], wanted: Int32[Array, "4"], interpreted: bool
) -> Float32[Array, "4 W"]:
    """x with -inf in place of all but the first `wanted` elements that equal `value`.

    Layouts: `ROW_PER_WARP` for x, `ROW_VECTOR` for `value` and `wanted`.
    """
    if interpreted:
        equal = x == value[:, None]
        return jnp.where(equal & (jnp.cumsum(equal, axis=1) > wanted[:, None]), -jnp.inf, x)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ROW_PER_WARP)
    return plgpu.inline_mgpu(arg_types=(ROW_PER_WARP, ROW_VECTOR, ROW_VECTOR), return_type=result)(_drop_repeats)(
        x, value, wanted
    )


def append_to_lists(
    chosen: Bool[Array, "4 W"],
    number: Int32[Array, "4 W"],
    length: Int32[Array, "4"],
    first: Int32[Array, ""],
    lists_ref,
    interpreted: bool,
) -> Int32[Array, "4"]:
    """Appends the block numbers of chosen columns to four lists, in column order, or from four lengths on to one list.

    Args:
      chosen, number: which columns, and their block numbers, in the layout `ROW_PER_WARP`.
      length: lengths of the lists so far, in the layout `ROW_VECTOR`.
      first: rows before this one are not written.
      lists_ref: [4, N], or [1, N] for one list, in global memory; entries beyond N are dropped.
      interpreted: whether JAX's interpreter runs this.

    Returns:
      The new lengths, dropped entries included.
    """
    if interpreted:
        position = jnp.where(
            chosen, length[:, None] + jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1, lists_ref.shape[1]
        )
        for row in range(WARPS):

            @pl.when(row >= first)
            def _(row=row):
                own = row % lists_ref.shape[0]
                lists_ref[own] = lists_ref[own].at[position[row]].set(number[row], mode="drop")

        return length + chosen.sum(axis=1, dtype=jnp.int32)
    types = ROW_PER_WARP, ROW_PER_WARP, ROW_VECTOR, SCALAR, plgpu.RefType()
    result = plgpu.ShapeDtypeStruct((WARPS,), jnp.int32, layout=ROW_VECTOR)
    append = plgpu.inline_mgpu(arg_types=types, return_type=result)(_append_to_lists)
    return append(chosen, number, length, first, lists_ref)


def write_counts(counts: Int32[Array, "4"], first: Int32[Array, ""], counts_ref, interpreted: bool) -> None:
    """Stores the counts of the rows from `first` on in counts_ref [4]; in counts_ref [1] that of the one row that all warps have."""
    if interpreted:
        for row in range(counts_ref.shape[0]):

            @pl.when(row >= first)
            def _(row=row):
                counts_ref[row] = counts[row]

        return
    plgpu.inline_mgpu(arg_types=(ROW_VECTOR, SCALAR, plgpu.RefType()))(_write_counts)(counts, first, counts_ref)


def _own_row(ctx: mgpu.LaunchContext, rows: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    del ctx
    return mgpu.FragmentedArray.splat(_scalar(rows.registers.item()), (), is_signed=True)


def _drop_repeats(
    ctx: mgpu.LaunchContext, x: mgpu.FragmentedArray, value: mgpu.FragmentedArray, wanted: mgpu.FragmentedArray
) -> mgpu.FragmentedArray:
    del ctx
    its_value, its_wanted = (_scalar(v.registers.item()) for v in (value, wanted))
    nothing = arith.constant(ir.F32Type.get(), -np.inf)
    positions, registers = _RunningCount(_constant(0)), np.empty(x.registers.shape, dtype=object)
    for i, register in np.ndenumerate(x.registers):
        equal = arith.cmpf(arith.CmpFPredicate.OEQ, _scalar(register), its_value)
        surplus = arith.cmpi(arith.CmpIPredicate.sge, positions.take(equal), its_wanted)
        registers[i] = _register(arith.select(arith.andi(equal, surplus), nothing, _scalar(register)))
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _append_to_lists(
    ctx: mgpu.LaunchContext,
    chosen: mgpu.FragmentedArray,
    number: mgpu.FragmentedArray,
    length: mgpu.FragmentedArray,
    first: mgpu.FragmentedArray,
    lists: ir.Value,
) -> mgpu.FragmentedArray:
    del ctx
    row, written = _row(first, ir.MemRefType(lists.type))
    width = _constant(ir.MemRefType(lists.type).shape[1])
    positions = _RunningCount(_scalar(length.registers.item()))
    for chose, block in zip(chosen.registers.flat, number.registers.flat, strict=True):
        position = positions.take(_scalar(chose))
        fits = arith.andi(written, arith.cmpi(arith.CmpIPredicate.slt, position, width))
        with mgpu.when(arith.andi(_scalar(chose), fits)):
            memref.store(_scalar(block), lists, [row, arith.index_cast(ir.IndexType.get(), position)])
    registers = np.full(length.registers.shape, _register(positions.count), dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=length.layout, _is_signed=True)


def _write_counts(
    ctx: mgpu.LaunchContext, values: mgpu.FragmentedArray, first: mgpu.FragmentedArray, counts: ir.Value
) -> None:
    del ctx
    kind = ir.MemRefType(counts.type)
    row, written = _row(first, kind)
    thread = _lane() if kind.shape[0] == WARPS else mgpu.thread_idx()
    one_lane = arith.cmpi(arith.CmpIPredicate.eq, thread, _constant(0))
    with mgpu.when(arith.andi(written, one_lane)):
        memref.store(_scalar(values.registers.item()), counts, [row])


def _row(first: mgpu.FragmentedArray, rows: ir.MemRefType) -> tuple[ir.Value, ir.Value]:
    """Row of this warp among those of a reference [4, ...] or [1, ...], and whether it is written."""
    if rows.shape[0] == 1:
        return arith.constant(ir.IndexType.get(), 0), arith.constant(ir.IntegerType.get_signless(1), 1)
    warp = arith.remui(arith.divui(mgpu.thread_idx(), _constant(LANES)), _constant(WARPS))
    written = arith.cmpi(arith.CmpIPredicate.sge, warp, first.registers.item())
    return arith.index_cast(ir.IndexType.get(), warp), written


def _lane() -> ir.Value:
    return arith.remui(mgpu.thread_idx(), _constant(LANES))


class _RunningCount:
    """Positions of the members of a row, 32 columns at a time: a ballot tells each lane which other lanes hold members."""

    def __init__(self, count: ir.Value):
        self._lower_lanes = arith.subi(arith.shli(_constant(1), _lane()), _constant(1))
        self.count = count  # members so far

    def take(self, member: ir.Value) -> ir.Value:
        """Number of members before this lane's column. Adds those of the 32 columns to the count."""
        ballot = nvvm.vote_sync(_constant(-1), member, nvvm.VoteSyncKind.ballot)
        position = arith.addi(self.count, math.ctpop(arith.andi(ballot, self._lower_lanes)))
        self.count = arith.addi(self.count, math.ctpop(ballot))
        return position


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> ir.Value:
    return arith.constant(_i32(), value)


def _scalar(register: ir.Value) -> ir.Value:
    """The element of a register."""
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _register(scalar: ir.Value) -> ir.Value:
    return vector.broadcast(ir.VectorType.get((1,), scalar.type), scalar)

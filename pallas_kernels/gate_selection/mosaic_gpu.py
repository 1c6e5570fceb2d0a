"""`select_blocks` for Hopper GPUs, in Pallas Mosaic GPU: one kernel reads the logits once and writes the lists once.

A warp holds a whole row in registers, 32 columns per register, so that sums over a row stay within the warp. A CTA of four warps
takes four adjacent rows. Every rule becomes a cutoff per row (`_Choice`): a threshold gives it by formula, the other rules find it by
bisection (`bisection.py`), which measures the row about a dozen times.

Rows of more columns than a warp's registers hold are quartered: a CTA takes one row, a warp a quarter of its visible part, and what the warps
find in their quarters is joined through shared memory (`row_parts.py`).

Rows and columns need not be multiples of 4 and 32; those that are quartered are padded to a multiple of 128 columns. The last tile of a list starts early and repeats some rows. The last 32 columns
are loaded into a register of their own, in which those that other registers hold are masked.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from pallas_kernels.backends import Unsupported
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.devices import interpreter
from pallas_kernels.gate_selection.bisection import any_row, best, count, full, next_up
from pallas_kernels.gate_selection.row_parts import RowParts
from pallas_kernels.gate_selection.warp_rows import (
    LANES,
    ROW_PER_WARP,
    ROW_VECTOR,
    WARPS,
    append_to_lists,
    own_row,
    write_counts,
)

WARP_KEY_BLOCKS = 4096  # capacity of a warp's registers: 256k tokens in blocks of 64
MAX_KEY_BLOCKS = WARPS * WARP_KEY_BLOCKS

_GROUP = 8 * LANES  # columns written at a time; more would take registers from other CTAs
_SCRATCH = 4 * WARPS * LANES  # bytes of shared memory for a reduction over warps
_LOWEST, _TINY = float(jnp.finfo(jnp.float32).min), float(jnp.finfo(jnp.float32).tiny)

_f32, _i32 = jnp.float32, jnp.int32


def select_blocks(
    logits: Float32[Array, "*lists R Sb"],
    *,
    block_size: int,
    threshold: Float[Array, "*lists R 1"] | None,
    mass: Float[Array, "*lists R 1"] | None,
    top_k: int | Int32[Array, "*lists R 1"] | None,
    max_blocks: int | Int32[Array, "*lists R 1"] | None,
    keep: Bool[Array, "..."] | None,
    visible: Int32[Array, "*lists R 1"] | None,
    width: int,
) -> BlockIndices:
    """See the function of this name in api.py."""
    if logits.shape[-1] > MAX_KEY_BLOCKS:
        raise Unsupported(f"takes rows of at most {MAX_KEY_BLOCKS} key blocks; got {logits.shape[-1]}.")
    rules = dict(threshold=threshold, mass=mass, top_k=top_k, max_blocks=max_blocks)
    rule, value = next(((name, value) for name, value in rules.items() if value is not None), ("all", 0))
    value = jnp.broadcast_to(jnp.asarray(value, _f32), (*logits.shape[:-1], 1))[..., 0]  # counts are exact in float32
    visible = None if visible is None else visible[..., 0]
    counts, indices = _batchable(rule, width, interpreter())(logits, value, visible, keep)
    return BlockIndices(counts, indices, block_size)


def _batchable(rule: str, width: int, interpret: Any) -> Any:
    """`_select`, under `jax.vmap` with more lists for the same kernel, whose CTAs take four rows of any lists."""

    @jax.custom_batching.custom_vmap
    def select(*operands: Any) -> Any:
        return _select(rule, width, interpret, *operands)

    @select.def_vmap
    def _(size: int, batched: list[Any], logits: Array, value: Array, visible: Any, keep: Any) -> Any:
        def fold(x: Array | None, is_batched: Any, own: int) -> Array | None:
            if x is None or is_batched:
                return x
            return jnp.broadcast_to(x, (own, *x.shape))  # `keep` may be shared between lists

        sizes = size, size, size, 1
        operands = [fold(*of) for of in zip((logits, value, visible, keep), batched, sizes, strict=True)]
        return select(*operands), (True, True)

    return select


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that a kernel is compiled for: A lists of R rows of S key blocks, each of which uses one of the A' lists of `keep`.

    Attributes:
      rule: name of the rule.
      lists, keep_lists: leading axes of the logits and of `keep`, the latter as long or 1; A and A' are their products. None: no
        `keep`.
      rows: R, at least 4 unless rows are quartered.
      columns: S, at least 32.
      quarters: whether the warps of a CTA share a row; S is a multiple of 128 then.
      limited: whether there is a number of visible blocks per row.
      interpreted: whether JAX's interpreter runs the kernel.
    """

    rule: str
    lists: tuple[int, ...]
    keep_lists: tuple[int, ...] | None
    rows: int
    columns: int
    quarters: bool
    limited: bool
    interpreted: bool

    @property
    def parts(self) -> RowParts:
        """What the warps hold."""
        return RowParts(self.quarters, self.interpreted)

    @property
    def tile_rows(self) -> int:
        """Rows of a CTA."""
        return 1 if self.quarters else WARPS

    @property
    def tiles(self) -> int:
        """Tiles of rows in each list."""
        return -(-self.rows // self.tile_rows)

    @property
    def whole(self) -> int:
        """Columns that fill registers of 32; the remaining ones share a register with some of these."""
        return self.columns // LANES * LANES

    def work_of(self, tile: Array) -> tuple[Array, Array, Array, Array]:
        """(list, list of `keep`, first row, number of rows that belong to the previous tile) of a tile."""
        index, tile = lax.div(tile, _i32(self.tiles)), lax.rem(tile, _i32(self.tiles))
        keep_index, rest, stride = _i32(0), index, 1
        for size, own in zip(self.lists[::-1], (self.keep_lists or self.lists)[::-1], strict=True):
            if own > 1:
                keep_index += lax.rem(rest, _i32(size)) * stride
            rest, stride = lax.div(rest, _i32(size)), stride * own
        start = jnp.minimum(tile * self.tile_rows, self.rows - self.tile_rows)
        return index, keep_index, start, tile * self.tile_rows - start

    @property
    def prefixes(self) -> list[int]:
        """Numbers of columns for which the kernel is compiled: a row takes the smallest that holds its visible blocks."""
        if not self.limited or self.columns < 8 * LANES:
            return [self.columns]
        multiple = WARPS * LANES if self.quarters else LANES
        quarter = -(-self.columns // (4 * multiple)) * multiple
        return [*range(quarter, self.columns, quarter), self.columns]

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(first column, size) of the parts that are loaded alike: the full registers, and the one of the last columns."""
        return [(0, self.whole)] + ([(self.whole, LANES)] if self.columns > self.whole else [])

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(first column, size) of the columns that are written at a time."""
        whole, *last = self.pieces
        return [(first, min(_GROUP, whole[1] - first)) for first in range(0, whole[1], _GROUP)] + last

    def source(self, first: int) -> int:
        """Block number of the first column of a piece or a group."""
        return first if first < self.whole else self.columns - LANES

    def numbers(self, first: int, size: int) -> Int32[Array, "4 size"]:
        """Block numbers of columns within a piece."""
        numbers = plgpu.broadcasted_iota(_i32, (WARPS, size), 1, layout=ROW_PER_WARP) + self.source(first)
        return numbers + (self.parts.numbers() * self.columns)[:, None] if self.quarters else numbers


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _select(
    rule: str,
    width: int,
    interpret: Any,
    logits: Float32[Array, "*lists R Sb"],
    value: Float32[Array, "*lists R"],
    visible: Int32[Array, "*lists R"] | None,
    keep: Bool[Array, "..."] | None,
) -> tuple[Int32[Array, "*lists R"], Int32[Array, "*lists R N"]]:
    """Counts and indices. `value` is the rule's parameter: threshold, mass or number."""
    *lists, rows, columns = logits.shape
    keep_lists, quarters = lists, columns > WARP_KEY_BLOCKS
    if keep is not None:
        keep_lists = lists if rows < WARPS and not quarters else keep.shape[:-2]
        keep = jnp.broadcast_to(keep, (*keep_lists, rows, columns)).astype(jnp.int8)
    if keep is None or keep.shape == logits.shape:
        # No `keep` is shared between lists: all rows form one list.
        lists, keep_lists, rows = [], [], math.prod(lists) * rows
    shared = None if keep is None else tuple(keep_lists)
    if quarters:
        sizes = rows, -(-columns // (WARPS * LANES)) * WARPS * LANES
        # Each warp reads the number of its row.
        value = jnp.repeat(value[..., None], WARPS, axis=-1)
        visible = None if visible is None else jnp.repeat(visible[..., None], WARPS, axis=-1)
    else:
        sizes = max(rows, WARPS), max(columns, LANES)
    call = _Call(rule, tuple(lists), shared, *sizes, quarters, visible is not None, interpret is not None)
    per_row = (WARPS,) if quarters else ()

    def fold(x: Array, own: Any, axes: tuple[int, ...], fill: float, more: int = 0) -> Array:
        x = x.reshape(math.prod(own), rows, *axes)
        pad = [(0, 0), (0, call.rows - rows), *[(0, more)] * len(axes)]
        return jnp.pad(x, pad, constant_values=fill)  # a copy only of tiny arrays, or of long rows of an odd length

    more = call.columns - columns
    operands = [fold(logits, lists, (columns,), -jnp.inf, more), fold(value, lists, per_row, 1)]
    operands += [] if visible is None else [fold(visible, lists, per_row, 0)]
    operands += [] if keep is None else [fold(keep, keep_lists, (columns,), 0, more)]
    outputs = math.prod(lists), call.rows
    counts, indices = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=[jax.ShapeDtypeStruct(outputs, _i32), jax.ShapeDtypeStruct((*outputs, width), _i32)],
        grid=(outputs[0] * call.tiles,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=_SCRATCH if quarters else 0),
        interpret=interpret,
    )(*operands)
    counts, indices = counts[:, :rows], indices[:, :rows]
    return counts.reshape(logits.shape[:-1]), indices.reshape(*logits.shape[:-1], width)


def _kernel(call: _Call, logits_ref, value_ref, *others) -> None:
    """Selects in four rows, or in one: logits [A, R, S], value [A, R] or [A, R, 4], optionally visible as `value`, and keep [A', R, S] to
    counts [A, R] and indices [A, R, N]."""
    *others, counts_ref, indices_ref = others
    index, keep_index, start, done = call.work_of(lax.axis_index("tile"))
    rows = pl.ds(start, call.tile_rows)

    def load_per_row(ref: Any) -> Array:
        return plgpu.load(ref.at[index, start if call.quarters else rows], layout=ROW_VECTOR, optimized=False)

    def of_tile(ref: Any, index: Array, columns: int) -> Any:
        """The tile's part of an array of all rows: [4, S], or these columns of a single row."""
        return ref.at[index, start, pl.ds(0, columns)] if call.quarters else ref.at[index, rows]

    visible = load_per_row(others[0]) if call.limited else None

    def select(columns: int) -> None:
        keep_ref = None if call.keep_lists is None else of_tile(others[-1], keep_index, columns)
        own = dataclasses.replace(call, columns=columns // WARPS if call.quarters else columns)
        tile = _Tile(own, of_tile(logits_ref, index, columns), keep_ref, visible)
        with jax.named_scope("cutoff"):
            choice = _RULES[call.rule](tile, load_per_row(value_ref))
        length = full(0)
        if call.quarters:
            in_groups = [choice.columns(tile, *group).astype(_i32).sum(axis=1) for group in tile.call.groups]
            length = call.parts.before(sum(in_groups[1:], in_groups[0]))
        for first, size in tile.call.groups:
            chosen, numbers = choice.columns(tile, first, size), tile.call.numbers(first, size)
            length = append_to_lists(chosen, numbers, length, done, indices_ref.at[index, rows], call.interpreted)
        counts = jnp.minimum(call.parts.joined(length, jnp.max), indices_ref.shape[-1])
        write_counts(counts, done, counts_ref.at[index, rows], call.interpreted)

    branches = [functools.partial(select, prefix) for prefix in call.prefixes]
    if visible is None or len(branches) == 1:
        branches[-1]()
    else:
        longer = sum([(visible > prefix).astype(_i32) for prefix in call.prefixes[:-1]], full(0))
        lax.switch(own_row(longer, call.interpreted), branches)


class _Tile(NamedTuple):
    """Four rows of the inputs, or the quarters of one.

    Fields:
      call: the sizes; S of a quarter, where the row is quartered.
      logits_ref, keep_ref: [4, S], or [4 S] of a row that is quartered; None if there is no `keep`.
      visible: [4], number of leading blocks that may be chosen; None: all.
    """

    call: _Call
    logits_ref: Any
    keep_ref: Any
    visible: Array | None

    def logits(self) -> Float32[Array, "4 W"]:
        """All columns, with -inf in place of NaN, and in columns that are duplicates."""

        def piece(first: int, size: int) -> Array:
            x = self._load(self.logits_ref, first, size)
            # A comparison with NaN is false.
            return jnp.where(self._may_be_chosen(x > -jnp.inf, first, size), x, -jnp.inf)

        return _join(piece(*x) for x in self.call.pieces)

    def keep(self, first: int, size: int) -> Bool[Array, "4 size"]:
        """Columns of a piece that are kept."""
        return self._may_be_chosen(self._load(self.keep_ref, first, size).astype(_i32) != 0, first, size)

    def _may_be_chosen(self, asked: Bool[Array, "4 size"], first: int, size: int) -> Bool[Array, "4 size"]:
        """Which of these columns are visible and no duplicates."""
        # Block numbers are made where they are compared alone: Mosaic GPU finds no layout for vectors that nothing reads.
        if first == self.call.whole:
            asked &= self.call.numbers(first, size) >= first
        if self.visible is None:
            return asked
        return asked & (self.call.numbers(first, size) < self.visible[:, None])

    def _load(self, ref: Any, first: int, size: int) -> Shaped[Array, "4 size"]:
        if self.call.quarters:
            if self.call.interpreted:  # which knows no references of another shape
                return ref[...].reshape(WARPS, self.call.columns)[:, first : first + size]
            ref = ref.reshape(WARPS, self.call.columns)
        return plgpu.load(ref.at[:, pl.ds(self.call.source(first), size)], layout=ROW_PER_WARP, optimized=False)


class _Choice(NamedTuple):
    """Columns of x [4, W] from the cutoff [4] of their row on, and those in `keep` unless x contains them."""

    x: Array
    cutoff: Array
    with_keep: bool = True

    def columns(self, tile: _Tile, first: int, size: int) -> Bool[Array, "4 size"]:
        """Which columns of a piece are chosen."""
        chosen = self.x[:, first : first + size] >= self.cutoff[:, None]
        if tile.keep_ref is None or not self.with_keep:
            return chosen
        return chosen | tile.keep(first, size)


def _all(tile: _Tile, _: Array) -> _Choice:
    return _Choice(tile.logits(), full(_LOWEST))


def _by_threshold(tile: _Tile, threshold: Float32[Array, "4"]) -> _Choice:
    weights = _softmax_weights(tile.logits(), tile.call.parts)
    cutoff = next_up(threshold * tile.call.parts.sum(weights))
    return _Choice(weights, jnp.maximum(cutoff, _TINY))


def _by_mass(tile: _Tile, mass: Float32[Array, "4"]) -> _Choice:
    logits, parts = tile.logits(), tile.call.parts
    weights = _softmax_weights(logits, parts)
    goal = jnp.where(mass < 1, mass * parts.sum(weights), jnp.inf)  # a mass of 1 takes all blocks, however small
    weights = jnp.where(logits > -jnp.inf, weights, -jnp.inf)

    def weigh(cutoff: Array) -> Array:
        return parts.sum(jnp.where(weights >= cutoff[:, None], weights, 0.0))

    return _Choice(*best(weights, goal, weigh, weighted=True, parts=parts))


def _by_top_k(tile: _Tile, top_k: Float32[Array, "4"]) -> _Choice:
    logits, parts = tile.logits(), tile.call.parts
    counted = functools.partial(count, logits, parts)
    return _Choice(*best(logits, top_k, counted, weighted=False, parts=parts))


def _by_max_blocks(tile: _Tile, max_blocks: Float32[Array, "4"]) -> _Choice:
    if tile.keep_ref is None:
        return _by_top_k(tile, max_blocks)

    def keep() -> Array:
        return _join(tile.keep(*x) for x in tile.call.pieces)

    parts = tile.call.parts
    left = max_blocks - parts.sum(keep().astype(_i32)).astype(_f32)
    logits = jnp.where(keep(), -jnp.inf, tile.logits())
    counted = functools.partial(count, logits, parts)
    x, cutoff = best(logits, jnp.maximum(left, 1), counted, weighted=False, parts=parts)
    x = jnp.where(keep(), jnp.inf, x)
    x = lax.cond(
        any_row(left < 0, parts.interpreted),
        lambda: parts.drop_repeats(x, full(jnp.inf), max_blocks.astype(_i32)),
        lambda: x,
    )
    return _Choice(x, jnp.where(left > 0, cutoff, jnp.inf), with_keep=False)


_RULES = {"threshold": _by_threshold, "mass": _by_mass, "top_k": _by_top_k, "max_blocks": _by_max_blocks, "all": _all}


def _softmax_weights(logits: Float32[Array, "4 W"], parts: RowParts) -> Float32[Array, "4 W"]:
    """Softmax up to a factor per row; 0 throughout if a row has no finite logit."""
    maximum = parts.max(logits)
    return jnp.exp(logits - jnp.where(maximum > -jnp.inf, maximum, 0.0)[:, None])


def _join(parts: Iterable[Array]) -> Array:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

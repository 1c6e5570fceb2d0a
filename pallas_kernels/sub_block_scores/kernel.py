"""The kernel of `score_sub_blocks`: see README.md beside this."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32

from pallas_kernels.mosaic.edge_tiles import store_inside
from pallas_kernels.mosaic.flash_tiles import MATRIX, ROW_VECTOR, columns, product, tile

ROWS = 64  # rows of a tile, those of a warpgroup's matrix product
COLUMNS = 8  # fewest blocks of a tile, since registers can be sliced at multiples of 8 columns
STAGES = 2  # tiles of keys in flight per warpgroup
MULTIPROCESSORS = 132
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor, of which each CTA takes 1 KiB besides its own
WARPGROUPS = (
    6  # that a multiprocessor has registers for, 80 per thread; of scores of 64 blocks, which take 96, one less
)
CACHE = 24 * 2**20  # bytes of keys that stay in L2 beside what else passes through it
TINY = 2.0**-126  # smallest share of a block that is seen
LN2 = math.log(2)
# 2^x for x from -0.5 to 0.5 by ascending powers of x, within a factor of 1 + 3e-6.
POWERS = 0.9999992847442627, 0.6931217908859253, 0.240247443318367, 0.05591785907745361, 0.009570102207362652
BY_POLYNOMIAL = 4  # one of so many columns
ROUNDER = 1.5 * 2**23 + 127  # a sum of this and a number has the nearest integer, plus float32's bias, in its last bits
_f32, _i32 = jnp.float32, jnp.int32


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel uses a multiprocessor.

    Args:
      warpgroups: warpgroups of a CTA, which share the queries.
      keys: key vectors of a tile: 64 or 128.
    """

    warpgroups: int
    keys: int = 64

    @classmethod
    def of(cls, vectors: int, dim: int, per_block: int, ctas: int = 1) -> "Tuning | None":
        """The choice with most warpgroups on a multiprocessor, or in a CTA where each has a multiprocessor of its own; None if no CTA fits.

        Args:
          vectors: query vectors of a row, for all heads that join.
          dim, per_block: C, and key vectors of a block.
          ctas: how many there are.
        """
        keys = max(64, COLUMNS * per_block)
        fitting = [x for n in (4, 3, 2, 1) if (x := cls(n, keys)).resident(vectors, dim, per_block)]
        if ctas <= MULTIPROCESSORS:
            return next(iter(fitting), None)
        return max(fitting, key=lambda x: x.resident(vectors, dim, per_block), default=None)

    @classmethod
    def most_vectors(cls, dim: int, per_block: int) -> int:
        """Query vectors per row that fit."""
        return max(n for n in range(1, 64) if cls.of(n, dim, per_block) is not None)

    def resident(self, vectors: int, dim: int, per_block: int) -> int:
        """Warpgroups of a multiprocessor; 0 where a CTA does not fit."""
        most = WARPGROUPS if self.keys < 64 * per_block else WARPGROUPS - 1
        return self.warpgroups * min(SHARED_MEMORY // (self.bytes(vectors, dim) + 1024), most // self.warpgroups)

    def bytes(self, vectors: int, dim: int) -> int:
        """Shared memory of a CTA, with room for barriers."""
        tiles = 2 * dim * (ROWS * vectors + self.warpgroups * STAGES * self.keys)
        return tiles + 4 * self.warpgroups * vectors * 3 * ROWS + 1024


@dataclasses.dataclass(frozen=True)
class Call:
    """Parameters that a kernel is compiled for.

    Attributes:
      batch, lists, kv_heads, dim: B, lists of the result, K, C.
      group: query heads of a list.
      rows, blocks: rows and Sb of the result.
      per_row, per_block: query vectors of a row and head, key vectors of a block.
      join, heads: see `score_sub_blocks`.
      tuning: how the kernel uses a multiprocessor.
      interpreted: whether JAX's interpreter runs the kernel.
    """

    batch: int
    lists: int
    kv_heads: int
    group: int
    dim: int
    rows: int
    blocks: int
    per_row: int
    per_block: int
    join: str
    heads: str
    tuning: Tuning
    interpreted: bool

    @property
    def vectors(self) -> int:
        """Query vectors of a row: for each of them, those of all heads that join."""
        return self.per_row * self.group

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def padded_rows(self) -> int:
        return self.row_tiles * ROWS

    @property
    def blocks_per_tile(self) -> int:
        """Key blocks of a tile, the columns of a tile of the result."""
        return self.tuning.keys // self.per_block

    @property
    def tiles(self) -> int:
        """Tiles of keys."""
        return -(-self.blocks // self.blocks_per_tile)

    @property
    def scores_shape(self) -> tuple[int, int]:
        """Shape of a list's scores; whole tiles in the interpreter, which does not run the stores that stop at the edge."""
        if self.interpreted:
            return self.padded_rows, self.tiles * self.blocks_per_tile
        return self.rows, self.blocks

    @property
    def keys_fit_in_cache(self) -> bool:
        return 2 * self.batch * self.kv_heads * self.tiles * self.tuning.keys * self.dim <= CACHE

    @property
    def in_exponents(self) -> bool:
        """Whether shares are only compared, so that their exponents will do."""
        return self.join == "max" and self.heads != "mean"

    def work_of(self, cta: Array) -> tuple[Array, Array, Array]:
        """(sequence, list, tile of rows) of a CTA. Late rows, which see most, start first: those of all lists, or if their keys would
        not stay in the L2 cache, those of each list.

        The second CTAs of the multiprocessors come in reverse, so that each multiprocessor has about as much to do.
        """
        lists = self.batch * self.lists
        second, last = _i32(MULTIPROCESSORS), min(2 * MULTIPROCESSORS, lists * self.row_tiles) - 1
        cta = jnp.where((cta >= second) & (cta <= last), second + last - cta, cta)
        fast = _i32(lists if self.keys_fit_in_cache else self.row_tiles)
        number, index = lax.div(cta, fast), lax.rem(cta, fast)
        if not self.keys_fit_in_cache:
            number, index = index, number
        return lax.div(index, _i32(self.lists)), lax.rem(index, _i32(self.lists)), self.row_tiles - 1 - number


def sub_block_kernel(call: Call, interpret: Any) -> Callable:
    """The kernel to scores [B, lists, rows, Sb] from

    queries [B, lists, vectors, rows, C] and keys [B, K, tiles, W, C], float16, arranged as in mosaic_gpu.py;
    factor [B, lists], above 0, from products to exponents of 2;
    bounds [b, row tiles, 4] and seen [b, 2, per_row, rows], with b either B or 1, see `_bounds` of mosaic_gpu.py.
    """
    groups, keys = call.tuning.warpgroups, call.tuning.keys
    return plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=jax.ShapeDtypeStruct((call.batch, call.lists, *call.scores_shape), _f32),
        grid=(call.batch * call.lists * call.row_tiles,),
        grid_names=("cta",),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types=[
            tile(call.vectors, ROWS, call.dim, jnp.float16),
            tile(groups, STAGES, keys, call.dim, jnp.float16),
            plgpu.SMEM((groups, call.vectors, 3, ROWS), _f32),
            plgpu.Barrier(num_arrivals=call.vectors),
            plgpu.Barrier(num_barriers=groups * STAGES),
            plgpu.Barrier(num_arrivals=groups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )


def _kernel(call: Call, queries_ref, keys_ref, factor_ref, bounds_ref, seen_ref, scores_ref, *scratch) -> None:
    query_tile, key_tiles, sums, queries_ready, keys_ready, sums_ready = scratch
    sequence, index, row_tile = call.work_of(lax.axis_index("cta"))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        for vector in range(call.vectors):
            source = queries_ref.at[sequence, index, vector, pl.ds(row_tile * ROWS, ROWS)]
            plgpu.copy_gmem_to_smem(source, query_tile.at[vector], queries_ready)

    own = sequence if bounds_ref.shape[0] > 1 else _i32(0)
    begin, end, full_begin, full_end = (bounds_ref[own, row_tile, i] for i in range(4))
    view = _View(call, row_tile, begin, end, full_begin, full_end, seen_ref.at[own])
    kv_head = lax.div(index, _i32(call.lists // call.kv_heads))
    ring = _Ring(call, view, warpgroup, keys_ref.at[sequence, kv_head], key_tiles, keys_ready)
    ring.start()
    plgpu.barrier_wait(queries_ready)
    multiply = _Products(call, view, query_tile, factor_ref[sequence, index])
    own_sums = sums.at[warpgroup]
    with jax.named_scope("sums"):
        _clear(call, own_sums)
        ring.walk(0, functools.partial(_add, multiply, own_sums))
    with jax.named_scope("join"):
        _log_sums(call, sums, sums_ready, warpgroup)
    target = scores_ref.at[sequence, index]
    with jax.named_scope("scores"):
        ring.walk(1, functools.partial(_write, multiply, own_sums, target))
        _write_nothing(call, view, warpgroup, target)


@dataclasses.dataclass(frozen=True)
class _View:
    """What the rows of a tile see.

    Attributes:
      call, row_tile: parameters, and number of the tile.
      begin, end: the first tile of keys that any vector sees, and the one after the last.
      full_begin, full_end: the same of the tiles that all see in full.
      seen: [2, per_row, rows], the first key vector that each query vector sees, and the one after the last.
    """

    call: Call
    row_tile: Array
    begin: Array
    end: Array
    full_begin: Array
    full_end: Array
    seen: Any

    def is_full(self, t: Array) -> Array:
        """Whether every vector sees all of a tile of keys."""
        return (t >= self.full_begin) & (t < self.full_end)

    def mask(self, t: Array, in_row: Array) -> Bool[Array, "64 W"]:
        """Which keys of a tile each row's vector sees."""
        width, blocks = self.call.tuning.keys, self.call.blocks_per_tile
        column = plgpu.broadcasted_iota(_i32, (ROWS, width), 1, layout=MATRIX)
        # The key vector in column n is n % blocks * per_block + n // blocks. Bits 1 and 2 of a column depend on the thread, the others on
        # the register: this compares constants with one number per row (see `mask` of flash_tiles.py).
        thread = column & 6
        constant = column - thread
        key = (constant & (blocks - 1)) * self.call.per_block + (constant >> int(math.log2(blocks)))
        rows = pl.ds(self.row_tile * ROWS, ROWS)
        first, end = (
            plgpu.load(self.seen.at[side, in_row, rows], layout=ROW_VECTOR, optimized=False) - t * width
            for side in range(2)
        )
        offset = thread * self.call.per_block
        return (key >= columns(first, column) - offset) & (key < columns(end, column) - offset)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The tiles of keys of a warpgroup, which it loads itself and walks twice: every so many tiles one from its own number on.

    Attributes:
      call, view: parameters, and what the rows see.
      warpgroup: number of this warpgroup.
      keys: [tiles, W, C] in global memory.
      key_tiles, ready: ring buffers [warpgroups, STAGES, W, C], and their barriers.
    """

    call: Call
    view: _View
    warpgroup: Array
    keys: Any
    key_tiles: Any
    ready: Any

    @property
    def count(self) -> Array:
        """Tiles of this warpgroup."""
        groups = self.call.tuning.warpgroups
        return lax.div(self.view.end - self.view.begin - self.warpgroup + (groups - 1), _i32(groups))

    def number(self, step: Array) -> Array:
        """Number of a tile."""
        return self.view.begin + self.warpgroup + step * self.call.tuning.warpgroups

    def load(self, n: Array) -> None:
        """Loads the tile of step n of both walks."""
        count = self.count

        @pl.when(n < 2 * count)
        def _():
            stage = lax.rem(n, _i32(STAGES))
            source = self.keys.at[self.number(jnp.where(n < count, n, n - count))]
            target = self.key_tiles.at[self.warpgroup, stage]
            plgpu.copy_gmem_to_smem(source, target, self.ready.at[self.warpgroup * STAGES + stage])

    def start(self) -> None:
        for n in range(STAGES):
            self.load(_i32(n))

    def walk(self, again: int, step: Callable) -> None:
        """Calls `step(t, keys, masked)` for each tile; `again` is 1 for the second walk."""
        count = self.count

        @pl.loop(_i32(0), count)
        def _(i: Array) -> None:
            n, t = i + again * count, self.number(i)
            stage = lax.rem(n, _i32(STAGES))
            plgpu.barrier_wait(self.ready.at[self.warpgroup * STAGES + stage])
            keys = self.key_tiles.at[self.warpgroup, stage]
            full, masked = (functools.partial(step, t, keys, masked) for masked in (False, True))
            lax.cond(self.view.is_full(t), full, masked)
            self.load(n + STAGES)


@dataclasses.dataclass(frozen=True)
class _Products:
    """Products of the rows' query vectors with a tile of keys."""

    call: Call
    view: _View
    queries: Any
    factor: Array

    def of(self, vector: Array, t: Array, keys: Any, masked: bool) -> Float32[Array, "64 W"]:
        """Products of one query vector of each row, in no scale; -inf where it does not see the key."""
        x = product(self.queries.at[vector], keys)
        if masked:
            x = jnp.where(self.view.mask(t, lax.div(vector, _i32(self.call.group))), x, -jnp.inf)
        return x


def _clear(call: Call, sums: Any) -> None:
    """Softmax sums over no keys."""
    # Not -inf: where every exponent is -inf, the difference of the two would be NaN.
    lowest, zero = (
        plgpu.layout_cast(jnp.full((ROWS,), value, _f32), ROW_VECTOR) for value in (float(jnp.finfo(_f32).min), 0.0)
    )

    @pl.loop(_i32(0), _i32(call.vectors))
    def _(vector: Array) -> None:
        sums[vector, 0], sums[vector, 1] = lowest, zero


def _add(multiply: _Products, sums: Any, t: Array, keys: Any, masked: bool) -> None:
    """Adds a tile of keys to the softmax sums of a warpgroup [vectors, 3, 64]: largest exponents of 2, and sums relative to them."""

    @pl.loop(_i32(0), _i32(multiply.call.vectors))
    def _(vector: Array) -> None:
        x = multiply.of(vector, t, keys, masked)
        before, total = (plgpu.load(sums.at[vector, i], layout=ROW_VECTOR) for i in range(2))
        maximum = jnp.maximum(before, x.max(axis=1) * multiply.factor)
        weights = jnp.exp2(x * multiply.factor - columns(maximum, x))
        sums[vector, 0] = maximum
        sums[vector, 1] = total * jnp.exp2(before - maximum) + weights.sum(axis=1)


def _log_sums(call: Call, sums: Any, ready: Any, warpgroup: Array) -> None:
    """Writes log2 of the sums of all warpgroups for each query vector of a row; inf where it sees nothing."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)

    @pl.loop(_i32(0), _i32(call.vectors))
    def _(vector: Array) -> None:
        maxima, totals = (
            [plgpu.load(sums.at[i, vector, j], layout=ROW_VECTOR) for i in range(call.tuning.warpgroups)]
            for j in range(2)
        )
        maximum = functools.reduce(jnp.maximum, maxima)
        parts = [total * jnp.exp2(x - maximum) for x, total in zip(maxima, totals, strict=True)]
        total = functools.reduce(jnp.add, parts)
        lse = maximum + jnp.log2(jnp.where(total > 0, total, 1))
        if call.heads == "mean":
            lse += math.log2(call.group)
        sums[warpgroup, vector, 2] = jnp.where(total > 0, lse, jnp.inf)


def _write(multiply: _Products, sums: Any, target: Any, t: Array, keys: Any, masked: bool) -> None:
    """Writes the scores of a tile of blocks."""
    call = multiply.call

    def shares(vector: Array) -> Array:
        x = multiply.of(vector, t, keys, masked)
        return _shares(call, x, multiply.factor, plgpu.load(sums.at[vector, 2], layout=ROW_VECTOR), masked)

    def of_row(in_row: Array) -> Array:
        first, combine = in_row * call.group, jnp.add if call.heads == "mean" else jnp.maximum
        return _reduced(lambda i: shares(first + i), call.group, combine, nothing)

    start = -jnp.inf if call.in_exponents else 0.0
    nothing = plgpu.layout_cast(jnp.full((ROWS, call.blocks_per_tile), start, _f32), MATRIX)
    best = _reduced(of_row, call.per_row, jnp.maximum, nothing)
    if not call.in_exponents:
        best = jnp.log2(best if masked else jnp.maximum(best, TINY))
    _store(call, best * LN2, multiply.view.row_tile, t, target)


def _reduced(
    of: Callable[[Array], Array], count: int, combine: Callable[[Array, Array], Array], nothing: Array
) -> Array:
    """Combines the results of `of(i)` for i below `count`, in a loop, from `nothing` on."""
    if count == 1:
        return of(_i32(0))
    return lax.fori_loop(_i32(0), _i32(count), lambda i, x: combine(x, of(i)), nothing)


def _shares(call: Call, x: Float32[Array, "64 W"], factor: Array, lse: Array, masked: bool) -> Float32[Array, "64 n"]:
    """Shares of the blocks of a tile, or exponents of 2 if these are not added afterwards."""
    if call.join == "max":
        x = _join(call, x, jnp.maximum)
    x = x * factor - columns(lse, x)
    if call.in_exponents:
        return x
    weights = _exp2(x, call.interpreted) if call.join == "sum" else jnp.exp2(x)
    if masked:
        weights = jnp.where(x > -jnp.inf, jnp.maximum(weights, TINY), 0.0)
    return weights if call.join == "max" else _join(call, weights, jnp.add)


def _exp2(x: Float32[Array, "64 W"], interpreted: bool) -> Float32[Array, "64 W"]:
    """exp2, of some of the columns by a polynomial: the units for exp2 are the bottleneck, those for sums and products are not."""
    size = x.shape[1] - x.shape[1] // BY_POLYNOMIAL
    rest = jnp.maximum(x[:, size:], math.log2(TINY))
    shifted = rest + ROUNDER
    if interpreted:
        shifted = lax.optimization_barrier(shifted)  # XLA would leave out a sum and its difference
    rest -= shifted - ROUNDER
    power = functools.reduce(lambda total, c: total * rest + c, POWERS[-2::-1], jnp.full_like(rest, POWERS[-1]))
    scale = lax.bitcast_convert_type(lax.bitcast_convert_type(shifted, _i32) << 23, _f32)
    return jnp.concatenate([jnp.exp2(x[:, :size]), power * scale], axis=1)


def _join(call: Call, x: Float32[Array, "64 W"], combine: Callable) -> Float32[Array, "64 n"]:
    """Combines the key vectors of each block."""
    size = call.blocks_per_tile
    return functools.reduce(combine, [x[:, i * size : (i + 1) * size] for i in range(call.per_block)])


def _write_nothing(call: Call, view: _View, warpgroup: Array, target: Any) -> None:
    """Writes -inf to the tiles that no row sees."""
    nothing = plgpu.layout_cast(jnp.full((ROWS, call.blocks_per_tile), -jnp.inf, _f32), MATRIX)
    seen = view.end - view.begin
    unseen = call.tiles - seen

    @pl.loop(_i32(0), lax.div(unseen - warpgroup + (call.tuning.warpgroups - 1), _i32(call.tuning.warpgroups)))
    def _(i: Array) -> None:
        number = warpgroup + i * call.tuning.warpgroups
        _store(call, nothing, view.row_tile, jnp.where(number < view.begin, number, number + seen), target)


def _store(call: Call, scores: Float32[Array, "64 n"], row_tile: Array, t: Array, ref: Any) -> None:
    """Stores the part of a tile that lies within the scores [rows, Sb] of a list."""
    (rows, blocks), width = call.scores_shape, call.blocks_per_tile
    row, column = row_tile * ROWS, t * width

    def store_whole() -> None:
        ref[pl.ds(row, ROWS), pl.ds(column, width)] = scores

    def store_to_edge() -> None:
        store_inside(scores, ref, row, column, layout=MATRIX, interpreted=False)

    if rows % ROWS == 0 and blocks % width == 0:
        store_whole()
    elif blocks % 2:
        # Registers hold pairs of elements, which an odd row length does not align.
        store_to_edge()
    else:
        lax.cond((row + ROWS <= rows) & (column + width <= blocks), store_whole, store_to_edge)

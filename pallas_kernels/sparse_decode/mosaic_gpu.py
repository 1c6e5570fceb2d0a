"""`sparse_decode_attention` for Hopper GPUs, in Pallas Mosaic GPU. README.md beside this explains the two kernels."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Unsupported
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.edge_tiles import store_inside
from pallas_kernels.mosaic.flash_tiles import (
    LOG2_E,
    MATRIX,
    QUERIES,
    ROW_VECTOR,
    Softmax,
    accumulate,
    columns,
    i32,
    positive_scale,
    product,
    tile,
)

KEYS = 64  # keys of a tile
COLUMNS = 64  # channels of values that are cleared at a time
TOKENS = 8  # TMA moves tokens in groups of 8; so do the rows of a matrix product
# README.md has the measurements behind these.
CTAS = 4 * 132  # CTAs that run at a time on an H100 or H200
MAX_PARTS = 64  # parts of a list
PARTS_AT_ONCE = 32  # parts that are merged at a time


def sparse_decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    *,
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"],
    scale: float,
    parts: int | None = None,
) -> tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """See the function of this name in api.py.

    Args:
      parts: number of parts of each list, a power of two up to 64; None for the choice of `choose_parts`.
    """
    (batch, heads, head_dim), (_, num_keys, kv_heads, _) = q.shape, k.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {q.dtype}.")
    if head_dim not in (64, 128):
        raise Unsupported(f"takes head dims 64 and 128; got {head_dim}.")
    if heads // kv_heads > QUERIES:
        raise Unsupported(f"takes groups of at most {QUERIES} query heads; got {heads // kv_heads}.")
    if num_keys % TOKENS:
        raise Unsupported(f"takes caches of a multiple of {TOKENS} tokens; got {num_keys}.")
    block_size = KEYS if blocks is None else blocks.block_size
    width = -(-num_keys // block_size) if blocks is None else blocks.width
    tiles = -(-width * block_size // KEYS)
    parts = parts or choose_parts(batch * kv_heads, tiles)
    q, scale = positive_scale(q, scale)
    call = _Call(batch, heads, kv_heads, head_dim, block_size, blocks is None, parts, scale * LOG2_E, interpreter())
    return _attend(call, q, k, v, blocks, jnp.stack([lengths, cache_rows], axis=1))


def choose_parts(lists: int, tiles: int) -> int:
    """Number of parts, a power of two: enough to keep all multiprocessors busy, at most a part per tile of a list."""
    parts = 1
    while parts * lists < CTAS and parts < min(tiles, MAX_PARTS):
        parts *= 2
    return parts


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that the kernels are compiled for: B, H, K, D, b, whether all blocks are read, parts of a list, c = scale * log2(e)."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dense: bool
    parts: int
    c: float
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of q in shared memory: the heads of a group, padded for a matrix product."""
        return -(-self.group // TOKENS) * TOKENS

    @property
    def piece(self) -> int:
        """Keys of a tile that are adjacent in the cache."""
        return min(self.block_size, KEYS)

    @property
    def pieces(self) -> int:
        """Number of pieces of a tile."""
        return KEYS // self.piece


@functools.partial(jax.jit, static_argnums=0)
def _attend(
    call: _Call,
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    bounds: Int[Array, "B 2"],
) -> tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    q_rows = q.reshape(call.batch, call.kv_heads, call.group, call.head_dim)
    q_rows = jnp.pad(q_rows, ((0, 0), (0, 0), (0, call.rows - call.group), (0, 0)))
    lists = () if blocks is None else (blocks.counts, blocks.indices)
    with jax.named_scope("split"):
        out, lse = _split_kernel(call, q.dtype)(q_rows, k, v, bounds, *lists)
    if call.parts == 1:
        return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])
    with jax.named_scope("merge"):
        out, lse = _merge_kernel(call, q.dtype)(out, lse)
    return out, lse[..., 0]


@dataclasses.dataclass(frozen=True)
class _KeyList:
    """The keys that the heads of a group read, in tiles of 64.

    Attributes:
      position: `position(t, i)` is the position of the first key of piece i of tile t.
      tiles: number of tiles.
      count: number of pieces on the list.
      length: keys of the sequence.
    """

    position: Callable[[Array, int], Array]
    tiles: Array
    count: Array
    length: Array

    @classmethod
    def read(cls, call: _Call, sequence: Array, head: Array, length: Array, counts: Any, indices: Any) -> "_KeyList":
        if call.dense:
            tiles = lax.div(length + KEYS - 1, i32(KEYS))
            return cls(lambda t, i: t * KEYS, tiles, tiles, length)
        per_block = call.block_size // call.piece
        count = jnp.where(length > 0, counts[sequence, head] * per_block, 0)

        def position(t: Array, i: int) -> Array:
            entry = jnp.minimum(t * call.pieces + i, jnp.maximum(count - 1, 0))
            block = indices[sequence, head, lax.div(entry, i32(per_block))]
            return block * call.block_size + lax.rem(entry, i32(per_block)) * call.piece

        return cls(position, lax.div(count + call.pieces - 1, i32(call.pieces)), count, length)

    def sees_all(self, call: _Call, t: Array, positions: tuple[Array, ...]) -> Array:
        """Whether a tile needs no mask."""
        whole = (t + 1) * call.pieces <= self.count
        for position in positions:
            whole &= position + call.piece <= self.length
        return whole

    def mask(self, call: _Call, scores: Array, t: Array, positions: tuple[Array, ...]) -> Array:
        """Scores with -inf for keys beyond the sequence and for pieces beyond the end of the list."""
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
        row = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        # As in `mask` of flash_tiles.py; bounds per row save registers here as well.
        thread = column & 6
        parts = []
        for i, visible in enumerate(self._visible(call, t, positions)):
            end = jnp.where(row < call.group, i * call.piece + visible, 0)
            inside = (column - thread) < columns(end, scores) - thread
            if i:
                inside &= column >= i * call.piece
            parts.append(inside)
        return jnp.where(functools.reduce(operator.or_, parts), scores, -jnp.inf)

    def clear(self, call: _Call, v_tile: Any, t: Array, positions: tuple[Array, ...]) -> None:
        """Writes zeros over the values of hidden keys, which may be NaN: a weight of 0 would not keep them out of the product."""
        row = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=ROW_VECTOR)
        parts = []
        for i, visible in enumerate(self._visible(call, t, positions)):
            parts.append((row >= i * call.piece) & (row < i * call.piece + visible))
        shown = functools.reduce(operator.or_, parts)
        for first in range(0, call.head_dim, COLUMNS):  # all at once would take the registers of other CTAs
            part = v_tile.at[:, pl.ds(first, COLUMNS)]
            values = plgpu.load(part, layout=MATRIX)
            part[...] = jnp.where(columns(shown, values), values, jnp.zeros_like(values))
        plgpu.commit_smem()

    def _visible(self, call: _Call, t: Array, positions: tuple[Array, ...]) -> list[Array]:
        """How many leading keys of each piece of a tile are seen."""
        return [
            jnp.where(t * call.pieces + i < self.count, jnp.clip(self.length - position, 0, call.piece), 0)
            for i, position in enumerate(positions)
        ]


def _split_kernel(call: _Call, dtype: Any) -> Callable:
    """The kernel from q [B, K, rows, D], k and v [P, S, K, D], (length, cache row) [B, 2] and optionally counts [B, K] and indices
    [B, K, N] to the out [B * K, parts, G, D] and lse [B * K, parts, G] of each part, float32."""

    def kernel(q_ref, k_ref, v_ref, bounds, *refs):
        *lists, out_ref, lse_ref, q_tile, k_tile, v_tile, q_ready, k_ready, v_ready = refs
        counts, indices = lists or (None, None)
        cta = lax.axis_index("cta")
        pair, part = lax.div(cta, i32(call.parts)), lax.rem(cta, i32(call.parts))
        sequence, head = lax.div(pair, i32(call.kv_heads)), lax.rem(pair, i32(call.kv_heads))
        plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], q_tile.at[pl.ds(0, call.rows)], q_ready)
        length, cache_row = bounds[sequence, 0], bounds[sequence, 1]
        keys = _KeyList.read(call, sequence, head, length, counts, indices)
        size = lax.div(keys.tiles + call.parts - 1, i32(call.parts))
        first = jnp.minimum(part * size, keys.tiles)
        end = jnp.minimum(first + size, keys.tiles)

        def positions(t: Array) -> tuple[Array, ...]:
            return tuple(keys.position(t, i) for i in range(call.pieces))

        def load(source: Any, target: Any, barrier: Any, t: Array, where: tuple[Array, ...]) -> None:
            @pl.when(t < end)
            def _():
                for i, position in enumerate(where):
                    rows = source.at[cache_row, pl.ds(position, call.piece), head]
                    plgpu.copy_gmem_to_smem(rows, target.at[pl.ds(i * call.piece, call.piece)], barrier)

        load_k = functools.partial(load, k_ref, k_tile, k_ready)
        load_v = functools.partial(load, v_ref, v_tile, v_ready)
        start = positions(first)
        load_k(first, start)
        load_v(first, start)
        plgpu.barrier_wait(q_ready)

        def step(carry: tuple[Array, tuple[Array, ...], Softmax], *, masked: bool) -> tuple[Array, tuple, Softmax]:
            t, where, state = carry
            following = positions(jnp.minimum(t + 1, keys.tiles - 1))  # read early, since it comes from L2
            plgpu.barrier_wait(k_ready)
            scores = product(q_tile, k_tile)
            load_k(t + 1, following)
            if masked:
                scores = keys.mask(call, scores, t, where)
            maximum, total, weights, factor = state.add(scores, call.c)
            out, weights = state.out * columns(factor, state.out), weights.astype(dtype)
            if not call.interpret:
                # The compiler would move these behind the wait, where nothing hides their time.
                out, total, maximum, weights = lax.optimization_barrier((out, total, maximum, weights))
            plgpu.barrier_wait(v_ready)
            if masked:
                keys.clear(call, v_tile, t, where)
            out = accumulate(out, weights, v_tile, call.interpret)
            load_v(t + 1, following)
            return t + 1, following, Softmax(out, maximum, total)

        def unmasked(carry: tuple[Array, tuple[Array, ...], Softmax]) -> Array:
            return (carry[0] < end) & keys.sees_all(call, *carry[:2])

        carry = first, start, Softmax.empty(call.head_dim)
        carry = lax.while_loop(unmasked, functools.partial(step, masked=False), carry)
        _, _, state = lax.while_loop(lambda carry: carry[0] < end, functools.partial(step, masked=True), carry)
        row = plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        out, lse = state.finish(row < call.group)
        interpreted = call.interpret is not None
        store_inside(out, out_ref.at[pair, part], layout=MATRIX, interpreted=interpreted)
        store_inside(lse, lse_ref.at[pair, part], layout=ROW_VECTOR, interpreted=interpreted)

    parts = call.batch * call.kv_heads, call.parts, call.group
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*parts, call.head_dim), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        scratch_types=[
            *(tile(n, call.head_dim, dtype) for n in (QUERIES, KEYS, KEYS)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=call.pieces),
            plgpu.Barrier(num_arrivals=call.pieces),
        ],
        grid=(call.batch * call.kv_heads * call.parts,),
        grid_names=("cta",),
        interpret=call.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )


def _merge_kernel(call: _Call, dtype: Any) -> Callable:
    """The kernel that merges the parts of `_split_kernel` to out [B, H, D] and lse [B, H, D], constant along D; a CTA per head.

    lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p
    """
    layout = _parts_layout(call.head_dim)

    def kernel(out_parts, lse_parts, out_ref, lse_ref):
        cta = lax.axis_index("cta")
        pair, in_group = lax.div(cta, i32(call.group)), lax.rem(cta, i32(call.group))
        sequence, head = lax.div(cta, i32(call.heads)), lax.rem(cta, i32(call.heads))

        def full(value: float) -> Array:
            return plgpu.layout_cast(jnp.full((call.head_dim,), value, jnp.float32), layout.reduce(0))

        # Not -inf: where every part is -inf, the difference of the two would be NaN.
        lowest = float(jnp.finfo(jnp.float32).min)
        maximum, total, out = full(lowest), full(0.0), full(0.0)
        size = min(call.parts, PARTS_AT_ONCE)
        for first in range(0, call.parts, size):
            some = pl.ds(first, size)
            values = plgpu.load(out_parts.at[pair, some, in_group], layout=layout, optimized=False)
            lse = plgpu.load(lse_parts.at[pair, some, in_group], layout=layout.reduce(1), optimized=False)
            lse = lax.broadcast_in_dim(lse, values.shape, [0])
            new_maximum = jnp.maximum(maximum, lse.max(axis=0))
            weights = jnp.exp(lse - lax.broadcast_in_dim(new_maximum, values.shape, [1]))
            factor = jnp.exp(maximum - new_maximum)
            total = total * factor + weights.sum(axis=0)
            out = out * factor + (weights * values).sum(axis=0)
            maximum = new_maximum
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out_ref[sequence, head] = (out / total).astype(dtype)
        lse_ref[sequence, head] = jnp.where(seen, maximum + jnp.log(total), -jnp.inf)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((call.batch, call.heads, call.head_dim), t) for t in (dtype, jnp.float32)],
        grid=(call.batch * call.heads,),
        grid_names=("cta",),
        interpret=call.interpret,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )


def _parts_layout(head_dim: int) -> Any:
    """Layout of [parts, D]: each thread holds all rows of one column; at D = 64, two threads hold each column."""
    warps = (-3,) if head_dim == 128 else (plgpu.Replicated(2), -3)
    tiling = plgpu.Tiling(((1, head_dim), (32,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=(-2,), vector_dim=-1)

"""`score_blocks` for Hopper GPUs, in Pallas Mosaic GPU: three float16 products per float32 product.

Elements are scaled by a power of two per head and split into two float16 parts, which together hold 22 bits. The tensor cores
multiply low by high, high by low and high by high, and sum in float32. The product of the low parts, 2^-22 of the result, is left out.

A CTA of one warpgroup takes 64 queries of one head and walks the key blocks 64 at a time. Several CTAs share a multiprocessor and
hide each other's waits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float16, Float32, Int, Int32

from pallas_kernels.backends import Unsupported
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.edge_tiles import store_inside

TILE = 64  # queries and key blocks that are multiplied at a time
STAGES = 2  # tiles of keys in flight

_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
_ACCUMULATOR = plgpu.ACC((TILE, TILE), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
_LARGEST = 7  # exponent of the largest element of a head after scaling
_MAX_EXPONENT = 126
_f32, _i32 = jnp.float32, jnp.int32


def score_blocks(
    queries: Float32[Array, "B T H C"],
    keys: Float32[Array, "B Sb K C"],
    *,
    scale: float,
    causal: bool,
    row_offset: Int[Array, ""],
) -> Float32[Array, "B H T Sb"]:
    """See the function of this name in api.py."""
    if queries.shape[3] not in (64, 128):
        raise Unsupported(f"takes vectors of 64 and 128 elements; got {queries.shape[3]}.")
    if queries.shape[1] < TILE:
        # For few queries, splitting all keys takes longer than the products.
        raise Unsupported(f"takes {TILE} queries or more; got {queries.shape[1]}.")
    return _score(scale, causal, interpreter(), queries, keys, row_offset)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that a kernel is compiled for: T, H, Sb, K, C, whether it stops at the diagonal, and whether it is interpreted."""

    rows: int
    heads: int
    blocks: int
    kv_heads: int
    dim: int
    causal: bool
    interpreted: bool

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // TILE)

    @property
    def scores_shape(self) -> tuple[int, int]:
        """Shape of a head's scores; whole tiles in the interpreter, which does not run the stores that stop at the edge."""
        shape = self.rows, self.blocks
        return (_round_up(shape[0]), _round_up(shape[1])) if self.interpreted else shape

    def work_of(self, cta: Array) -> tuple[Array, Array, Array]:
        """(sequence, head, first row) of a CTA. Heads follow each other; within a head, late rows, which see most, start first."""
        tile, rest = lax.rem(cta, _i32(self.row_tiles)), lax.div(cta, _i32(self.row_tiles))
        row = (self.row_tiles - 1 - tile) * TILE
        return lax.div(rest, _i32(self.heads)), lax.rem(rest, _i32(self.heads)), row

    def tiles(self, row: Array, row_offset_ref: Any) -> Array:
        """Number of tiles of key blocks that the queries from `row` on need."""
        every = _i32(-(-self.blocks // TILE))
        if not self.causal:
            return every
        last_needed = row_offset_ref[0] + row + (TILE - 1)
        return jnp.minimum(lax.div(last_needed, _i32(TILE)) + 1, every)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    scale: float,
    causal: bool,
    interpret: Any,
    queries: Float32[Array, "B T H C"],
    keys: Float32[Array, "B Sb K C"],
    row_offset: Int[Array, ""],
) -> Float32[Array, "B H T Sb"]:
    (batch, rows, heads, dim), (_, blocks, kv_heads, _) = queries.shape, keys.shape
    call = _Call(rows, heads, blocks, kv_heads, dim, causal, interpret is not None)
    with jax.named_scope("split"):
        (queries_parts, query_factor), (keys_parts, key_factor) = _split(queries), _split(keys)
    factor = scale * query_factor * jnp.repeat(key_factor, heads // kv_heads, axis=1)
    scores = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=jax.ShapeDtypeStruct((batch, heads, *call.scores_shape), _f32),
        grid=(batch * heads * call.row_tiles,),
        grid_names=("cta",),
        scratch_types=[
            plgpu.SMEM((2, TILE, dim), jnp.float16, transforms=_TILED),
            plgpu.SMEM((STAGES, 2, TILE, dim), jnp.float16, transforms=_TILED),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
    )(queries_parts, keys_parts, factor, row_offset.astype(_i32)[None])
    return scores[:, :, :rows, :blocks]


def _split(x: Float32[Array, "B N heads C"]) -> tuple[Float16[Array, "2 B padded heads C"], Float32[Array, "B heads"]]:
    """High and low parts of x divided by a factor, padded to whole tiles, and the factor, a power of two per head."""
    x = jnp.pad(x, ((0, 0), (0, _round_up(x.shape[1]) - x.shape[1]), (0, 0), (0, 0)))
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)  # one vector that is not finite must not take its head along
    exponent = jnp.frexp(size.max((1, 3)))[1] - _LARGEST
    exponent = jnp.clip(exponent, -_MAX_EXPONENT, _MAX_EXPONENT)  # the factor and its inverse are float32
    scaled = x * _power_of_two(-exponent)[:, None, :, None]
    high = lax.reduce_precision(scaled, 5, 10)  # XLA may remove a conversion to float16 and back
    return jnp.stack([high, scaled - high]).astype(jnp.float16), _power_of_two(exponent)


def _power_of_two(exponent: Int32[Array, "B heads"]) -> Float32[Array, "B heads"]:
    return jnp.ldexp(jnp.ones_like(exponent, _f32), exponent)


def _kernel(
    call: _Call,
    queries_ref,
    keys_ref,
    factor_ref,
    row_offset_ref,
    scores_ref,
    query_tile,
    key_tiles,
    queries_ready,
    keys_ready,
) -> None:
    """Scores [B, H, T, Sb] from parts of queries [2, B, T, H, C] and keys [2, B, Sb, K, C], factor [B, H] and row offset [1]."""
    sequence, head, row = call.work_of(lax.axis_index("cta"))
    kv_head = lax.div(head, _i32(call.heads // call.kv_heads))
    tiles = call.tiles(row, row_offset_ref)

    def load_keys(tile: Array) -> None:
        @pl.when(tile < tiles)
        def _():
            columns, stage = pl.ds(tile * TILE, TILE), lax.rem(tile, _i32(STAGES))
            for part in range(2):
                source = keys_ref.at[part, sequence, columns, kv_head]
                plgpu.copy_gmem_to_smem(source, key_tiles.at[stage, part], keys_ready.at[stage])

    def multiply(stage: Array, accumulator: Any) -> Array:
        # Small terms first, so that they are not rounded away.
        for query_part, key_part in ((1, 0), (0, 1), (0, 0)):
            plgpu.wgmma(accumulator, query_tile.at[query_part], key_tiles.at[stage, key_part].transpose((1, 0)))
        return accumulator[...]

    for part in range(2):
        source = queries_ref.at[part, sequence, pl.ds(row, TILE), head]
        plgpu.copy_gmem_to_smem(source, query_tile.at[part], queries_ready)
    for tile in range(STAGES):
        load_keys(_i32(tile))
    factor = factor_ref[sequence, head]
    plgpu.barrier_wait(queries_ready)

    @pl.loop(_i32(0), tiles)
    def _(tile: Array) -> None:
        stage = lax.rem(tile, _i32(STAGES))
        plgpu.barrier_wait(keys_ready.at[stage])
        scores = pl.run_scoped(functools.partial(multiply, stage), _ACCUMULATOR) * factor
        load_keys(tile + STAGES)
        _store(call, scores, row, tile * TILE, scores_ref.at[sequence, head])


def _store(call: _Call, scores: Float32[Array, "64 64"], row: Array, column: Array, ref: Any) -> None:
    """Stores the part of a tile that lies within the scores [T, Sb] of a head."""
    rows, columns = call.scores_shape

    def store_whole() -> None:
        ref[pl.ds(row, TILE), pl.ds(column, TILE)] = scores

    def store_to_edge() -> None:
        store_inside(scores, ref, row, column, layout=plgpu.Layout.WGMMA, interpreted=False)

    if rows % TILE == 0 and columns % TILE == 0:
        store_whole()
    elif columns % 2:
        # Registers hold pairs of elements, which an odd row length does not align.
        store_to_edge()
    else:
        lax.cond((row + TILE <= rows) & (column + TILE <= columns), store_whole, store_to_edge)


def _round_up(size: int) -> int:
    return -(-size // TILE) * TILE

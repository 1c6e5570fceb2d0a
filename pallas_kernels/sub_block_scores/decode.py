"""The kernel of `score_sub_blocks` for one query vector per sequence, and what prepares its arrays: see README.md beside this."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32

from pallas_kernels.backends import Unsupported
from pallas_kernels.mosaic.edge_tiles import store_inside, store_transposed
from pallas_kernels.mosaic.flash_tiles import LOG2_E, MATRIX, ROW_VECTOR, accumulator, columns, tile
from pallas_kernels.precision import rounded

BLOCKS = 64  # key blocks of a CTA, the rows of a matrix product
ALIGNMENT = 8  # TMA moves blocks in groups of 8
SCRATCH = 128  # bytes of shared memory per column for a reduction over rows
HEADS = 8  # query heads come in groups of this size, the smallest width of a matrix product
RING = 64 * 1024  # bytes of keys in flight per CTA, three of which share a multiprocessor
TINY = 2.0**-126  # smallest share of a block that is seen
MAX_PRODUCTS = 128  # products per block, of all heads and key vectors, that registers hold
_f32, _i32 = jnp.float32, jnp.int32


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that the kernel is compiled for.

    Attributes:
      batch, kv_heads, group, dim: B, K, G, C.
      blocks, per_block: Sb, and key vectors of a block.
      largest: whether the largest products of blocks are returned instead of their sums.
      interpreted: whether JAX's interpreter runs the kernel.
    """

    batch: int
    kv_heads: int
    group: int
    dim: int
    blocks: int
    per_block: int
    largest: bool
    interpreted: bool

    @property
    def width(self) -> int:
        """Columns of a product: the heads of a group and padding."""
        return -(-self.group // HEADS) * HEADS

    @property
    def block_tiles(self) -> int:
        return -(-self.blocks // BLOCKS)

    @property
    def stages(self) -> int:
        """Tiles of keys in flight."""
        return min(self.per_block, RING // (2 * BLOCKS * self.dim))

    @property
    def padded_blocks(self) -> int:
        """Blocks of the results; whole tiles in the interpreter, which does not run the stores that stop at the edge."""
        return self.block_tiles * BLOCKS if self.interpreted else self.blocks


def score_for_one_query(
    static: tuple[int, str, str, float],
    interpret: Any,
    queries: Float32[Array, "B 1 H C"],
    keys: Float[Array, "P Sw K C"],
    seen: Int32[Array, "#B 1 2"],
    first_row: Int32[Array, ""] | None,
) -> Float32[Array, "B lists 1 Sb"]:
    """As `score_sub_blocks`; static: `keys_per_block`, `join`, `heads` and `scale`.

    Raises:
      Unsupported: the kernel does not take these arguments.
    """
    per_block, (_, num_keys, kv_heads, dim) = static[0], keys.shape
    call = _Call(
        batch=len(queries),
        kv_heads=kv_heads,
        group=queries.shape[2] // kv_heads,
        dim=dim,
        blocks=num_keys // per_block,
        per_block=per_block,
        largest=static[1] == "max",
        interpreted=interpret is not None,
    )
    if keys.dtype != jnp.bfloat16:
        raise Unsupported(f"takes bfloat16 keys for one query vector; got {keys.dtype}.")
    if num_keys % (ALIGNMENT * per_block):
        whole = f"a multiple of {ALIGNMENT} blocks of {per_block} key vectors"
        raise Unsupported(f"takes {whole} for one query vector; got {num_keys} vectors.")
    if call.width * per_block > MAX_PRODUCTS:
        raise Unsupported(f"takes at most {MAX_PRODUCTS} products per block; got {call.width} x {per_block}.")
    first_row = jnp.int32(0) if first_row is None else first_row
    return _score(call, static[2:], interpret, queries, keys, seen, first_row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    call: _Call,
    static: tuple[str, float],
    interpret: Any,
    queries: Float32[Array, "B 1 H C"],
    keys: BFloat16[Array, "P Sw K C"],
    seen: Int32[Array, "#B 1 2"],
    first_row: Int32[Array, ""],
) -> Float32[Array, "B lists 1 Sb"]:
    heads, scale = static
    with jax.named_scope("split"):
        grouped = (scale * LOG2_E * queries).reshape(call.batch, call.kv_heads, call.group, call.dim)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, call.width - call.group), (0, 0)))
        high = rounded(grouped, jnp.bfloat16)
        parts = jnp.stack([high, grouped - high]).astype(jnp.bfloat16)
    # By head, as caches keep them: then this transposition cancels that of the caller.
    keys = keys.swapaxes(1, 2).reshape(len(keys), call.kv_heads, call.blocks, call.per_block, call.dim)
    bounds = jnp.broadcast_to(jnp.clip(seen[:, 0], 0, call.blocks * call.per_block), (call.batch, 2))
    bounds = jnp.concatenate([bounds, (first_row + jnp.arange(call.batch))[:, None]], axis=1)
    tiles, products = _kernel_of(call, interpret)(parts, keys, bounds)
    with jax.named_scope("normalise"):
        largest, total = _sums_over_last_axis(tiles)
        # Head by head, without a reduction: XLA fuses all of this with what follows.
        heads_of_block = [products[:, :, : call.blocks, i] for i in range(call.group)]
        shares = [jnp.exp2(x - largest[:, :, i, None]) / total[:, :, i, None] for i, x in enumerate(heads_of_block)]
        if heads == "each":
            shares, seen = (jnp.stack(x, axis=2).reshape(call.batch, -1, call.blocks) for x in (shares, heads_of_block))
        else:
            combine, factor = (jnp.maximum, 1.0) if heads == "max" else (jnp.add, 1 / call.group)
            shares, seen = functools.reduce(combine, shares) * factor, heads_of_block[0]  # all heads see the same
        scores = jnp.where(seen > -jnp.inf, jnp.log(jnp.maximum(shares, TINY)), -jnp.inf)
    return scores[:, :, None]


def _sums_over_last_axis(x: Float32[Array, "B K width n"]) -> tuple[Float32[Array, "B K width"], ...]:
    """The largest element, and the sum of exp2(element - largest), which is 0 where all are -inf; in one reduction."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp2(a[0] - largest) + b[1] * jnp.exp2(b[0] - largest)

    lowest = np.finfo(np.float32).min  # not -inf, for which the difference would be NaN
    return tuple(lax.reduce((x, jnp.ones_like(x)), (lowest, np.float32(0)), join, (x.ndim - 1,)))


def _kernel_of(call: _Call, interpret: Any) -> Callable:
    """The kernel from queries [2, B, K, width, C], keys [P, K, Sb, vectors, C] and bounds [B, 3], the first key vector that is seen, the
    one after the last, and the row of the keys, to log2 of the sums of the tiles of blocks, [B, K, width, tiles], and of the blocks, or
    the largest products of these, [B, K, Sb, width]."""
    shapes = (call.width, call.block_tiles), (call.padded_blocks, call.width)
    return plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=[jax.ShapeDtypeStruct((call.batch, call.kv_heads, *shape), _f32) for shape in shapes],
        grid=(call.batch * call.block_tiles * call.kv_heads,),
        grid_names=("cta",),
        scratch_types=[
            tile(2, call.width, call.dim, jnp.bfloat16),
            tile(call.stages, BLOCKS, call.dim, jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=call.stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=SCRATCH * call.width),
        interpret=interpret,
    )


def _kernel(call: _Call, queries_ref, keys_ref, bounds_ref, *refs) -> None:
    tiles_ref, blocks_ref, query_tile, key_tiles, queries_ready, keys_ready = refs
    cta = lax.axis_index("cta")
    rest, number = lax.div(cta, _i32(call.block_tiles)), lax.rem(cta, _i32(call.block_tiles))
    block = number * BLOCKS
    sequence, head = lax.div(rest, _i32(call.kv_heads)), lax.rem(rest, _i32(call.kv_heads))
    first, end, row = (bounds_ref[sequence, i] for i in range(3))

    def load(vector: int) -> None:
        source = keys_ref.at[row, head, pl.ds(block, BLOCKS), vector]
        stage = vector % call.stages
        plgpu.copy_gmem_to_smem(source, key_tiles.at[stage], keys_ready.at[stage])

    def store(of_tile: Array, of_blocks: Array) -> None:
        ref = tiles_ref.at[sequence, head, :, pl.ds(number, 1)]
        of_tile = lax.broadcast_in_dim(of_tile, of_blocks.shape, [1])
        store_transposed(of_tile, ref, layout=MATRIX, interpreted=call.interpreted)
        _store(call, of_blocks, block, blocks_ref.at[sequence, head])

    def score() -> None:
        for part in range(2):
            plgpu.copy_gmem_to_smem(queries_ref.at[part, sequence, head], query_tile.at[part], queries_ready)
        for vector in range(call.stages):
            load(vector)
        plgpu.barrier_wait(queries_ready)
        products = []
        for vector in range(call.per_block):
            stage = vector % call.stages
            plgpu.barrier_wait(keys_ready.at[stage])
            x = _products(query_tile, key_tiles.at[stage])
            if vector + call.stages < call.per_block:
                load(vector + call.stages)
            products.append(jnp.where(_seen(call, block, vector, first, end, x), x, -jnp.inf))
        largest = functools.reduce(jnp.maximum, products)
        base = jnp.where(largest > -jnp.inf, largest, 0)
        sums = _log2(base, functools.reduce(jnp.add, [jnp.exp2(x - base) for x in products]))
        top = sums.max(axis=0)
        base = jnp.where(top > -jnp.inf, top, 0)
        total = jnp.exp2(sums - lax.broadcast_in_dim(base, sums.shape, [1])).sum(axis=0)
        store(_log2(base, total), largest if call.largest else sums)

    def nothing() -> None:
        shapes = ((call.width,), MATRIX.reduce(0)), ((BLOCKS, call.width), MATRIX)
        store(*(plgpu.layout_cast(jnp.full(shape, -jnp.inf, _f32), layout) for shape, layout in shapes))

    is_seen = (first < end) & (block * call.per_block < end) & ((block + BLOCKS) * call.per_block > first)
    lax.cond(is_seen, score, nothing)


def _log2(base: Array, total: Array) -> Array:
    """log2 of sums relative to 2^base; -inf where they are 0."""
    return jnp.where(total > 0, base + jnp.log2(jnp.where(total > 0, total, 1)), -jnp.inf)


def _products(query_tile: Any, key_tile: Any) -> Float32[Array, "64 width"]:
    def multiply(result: Any) -> Array:
        for part in (1, 0):  # small terms first, so that they are not rounded away
            plgpu.wgmma(result, key_tile, query_tile.at[part].transpose((1, 0)))
        return result[...]

    return pl.run_scoped(multiply, accumulator((BLOCKS, query_tile.shape[1]), _f32))


def _seen(call: _Call, block: Array, vector: int, first: Array, end: Array, like: Array) -> Bool[Array, "64 width"]:
    """Which blocks' key vector of that number is seen."""
    row = plgpu.broadcasted_iota(_i32, (BLOCKS,), 0, layout=ROW_VECTOR)
    key = (block + row) * call.per_block + vector
    return columns((key >= first) & (key < end), like)


def _store(call: _Call, x: Float32[Array, "64 width"], block: Array, ref: Any) -> None:
    """Stores the part of a tile that lies within [Sb, width]."""

    def store_whole() -> None:
        ref[pl.ds(block, BLOCKS)] = x

    def store_to_edge() -> None:
        store_inside(x, ref, block, _i32(0), layout=MATRIX, interpreted=False)

    if call.padded_blocks % BLOCKS == 0:
        store_whole()
    else:
        lax.cond(block + BLOCKS <= call.padded_blocks, store_whole, store_to_edge)

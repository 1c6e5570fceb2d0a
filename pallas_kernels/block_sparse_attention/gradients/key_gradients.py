"""The gradients of keys and values on Hopper GPUs: one warpgroup per 64 keys walks the query tiles that list them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse_attention.gradients.transposed import WORD
from pallas_kernels.mosaic.flash_tiles import (
    LOG2_E,
    MATRIX,
    QUERIES,
    ROW_VECTOR,
    accumulate,
    accumulator,
    columns,
    i32,
    product,
    tile,
)

KEYS = 64  # keys of a tile, the rows of a warpgroup's matrix product
COLUMN_VECTOR = MATRIX.reduce(0)  # one element per column


@dataclasses.dataclass(frozen=True)
class KeySizes:
    """Sizes that the kernel is compiled for.

    Attributes:
      batch, num_keys, heads, kv_heads, head_dim: B, S, H, K and D.
      tiles: tiles of 64 keys in a sequence.
      tiles_per_row: tiles that share a row of `listed_by`, b / 64.
      words: words of the query tiles of one head.
      own_lists: whether each query head has its own lists; otherwise the heads of a group share them.
    """

    batch: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    tiles: int
    tiles_per_row: int
    words: int
    own_lists: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def programs(self) -> int:
        return self.batch * self.kv_heads * self.tiles


@dataclasses.dataclass(frozen=True)
class _Column:
    """The query tiles that list a tile of keys, of one head of the group after the other, in ascending order.

    A position is (number of a word, the bits of that word that are still ahead, the next word).

    Attributes:
      read: `read(i)` is word i of the column's row in `listed_by`.
      sizes: see `KeySizes`.
    """

    read: Callable[[Array], Array]
    sizes: KeySizes

    @property
    def total(self) -> int:
        return self.sizes.group * self.sizes.words

    def word(self, i: Array) -> Array:
        """Word i of all heads; the last one beyond the end."""
        i = jnp.minimum(i, self.total - 1)
        return self.read(i if self.sizes.own_lists else lax.rem(i, i32(self.sizes.words)))

    def start(self) -> tuple[Array, Array, Array]:
        return i32(0), self.word(i32(0)), self.word(i32(1))

    def following(self, position: tuple[Array, Array, Array]) -> tuple[Array, Array, tuple[Array, Array, Array]]:
        """(head in the group, query tile, position after it); beyond the end any numbers."""

        def is_empty(position: tuple[Array, Array, Array]) -> Array:
            return (position[1] == 0) & (position[0] < self.total - 1)

        def advance(position: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            i, _, ahead = position
            return i + 1, ahead, self.word(i + 2)  # read before it is needed, since it comes from L2

        i, bits, ahead = lax.while_loop(is_empty, advance, position)
        place = lax.clz(bits)
        left = bits & ~lax.shift_right_logical(i32(-(2**31)), place)
        number = i32(self.sizes.words)
        return lax.div(i, number), lax.rem(i, number) * WORD + place, (i, left, ahead)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What one query tile contributes, in shared memory: q and d_out [64, D], and (lse, delta) [2, 64]."""

    q: Any
    d_out: Any
    statistics: Any


def key_gradients_kernel(sizes: KeySizes, scale: float, interpret: Any, dtype: Any, stages: int = 2) -> Callable:
    """(q, k, v, d_out, statistics, listed_by, counts, order, offsets) -> (d_k, d_v); see mosaic_gpu.py beside this.

    Scores are transposed, keys by queries, so that the weights and their gradients are the left operands of the products that
    accumulate d_v and d_k, which a warpgroup may hold in registers.
    """
    c = scale * LOG2_E

    def kernel(*refs: Any) -> None:
        q_ref, k_ref, v_ref, d_out_ref, statistics_ref, listed_ref, counts_ref, order_ref, offsets_ref, *others = refs
        d_k_ref, d_v_ref, k_tile, v_tile, q_tiles, d_out_tiles, statistics, keys_ready, ready = others
        work = order_ref[lax.axis_index("cta")]
        rest, key_tile = lax.div(work, i32(sizes.tiles)), lax.rem(work, i32(sizes.tiles))
        sequence, kv_head = lax.div(rest, i32(sizes.kv_heads)), lax.rem(rest, i32(sizes.kv_heads))
        keys = sequence, pl.ds(key_tile * KEYS, KEYS), kv_head
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_tile, keys_ready)
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_tile, keys_ready)
        row = lax.div(key_tile, i32(sizes.tiles_per_row))
        column = _Column(lambda i: listed_ref[sequence, kv_head, row, i], sizes)
        count = counts_ref[sequence, kv_head, row]
        ahead = key_tile * KEYS - offsets_ref[sequence, 0]  # from the first query to the first key

        def tiles(t: Array) -> _Tiles:
            slot = lax.rem(t, i32(stages))
            return _Tiles(q_tiles.at[slot], d_out_tiles.at[slot], statistics.at[slot])

        def load(t: Array, in_group: Array, query_tile: Array) -> None:
            @pl.when(t < count)
            def _():
                head, to, barrier = kv_head * sizes.group + in_group, tiles(t), ready.at[lax.rem(t, i32(stages))]
                queries = sequence, pl.ds(query_tile * QUERIES, QUERIES), head
                plgpu.copy_gmem_to_smem(q_ref.at[queries], to.q, barrier)
                plgpu.copy_gmem_to_smem(d_out_ref.at[queries], to.d_out, barrier)
                plgpu.copy_gmem_to_smem(statistics_ref.at[sequence, head, query_tile], to.statistics, barrier)

        position, listed = column.start(), []
        for stage in range(stages):
            in_group, query_tile, position = column.following(position)
            load(i32(stage), in_group, query_tile)
            listed.append(query_tile)
        plgpu.barrier_wait(keys_ready)

        def step(t: Array, carry: tuple) -> tuple:
            (query_tile, *listed), position, sums = carry
            in_group, following, position = column.following(position)
            plgpu.barrier_wait(ready.at[lax.rem(t, i32(stages))])
            sums = _add(k_tile, v_tile, tiles(t), ahead - query_tile * QUERIES, sums, c, interpret)
            load(t + stages, in_group, following)
            return (*listed, following), position, sums

        zero = plgpu.layout_cast(jnp.full((KEYS, sizes.head_dim), 0, jnp.float32), MATRIX)
        *_, (d_k, d_v) = lax.fori_loop(i32(0), count, step, (tuple(listed), position, (zero, zero)))
        k_tile[...] = (d_k * scale).astype(dtype)
        v_tile[...] = d_v.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, d_k_ref.at[keys])
        plgpu.copy_smem_to_gmem(v_tile, d_v_ref.at[keys])
        plgpu.wait_smem_to_gmem(0)

    keys = jax.ShapeDtypeStruct((sizes.batch, sizes.num_keys, sizes.kv_heads, sizes.head_dim), dtype)
    return plgpu.kernel(
        kernel,
        out_type=[keys, keys],
        scratch_types=[
            tile(KEYS, sizes.head_dim, dtype),
            tile(KEYS, sizes.head_dim, dtype),
            tile(stages, QUERIES, sizes.head_dim, dtype),
            tile(stages, QUERIES, sizes.head_dim, dtype),
            plgpu.SMEM((stages, 2, QUERIES), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        ],
        grid=(sizes.programs,),
        grid_names=("cta",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )


def _add(
    k_tile: Any, v_tile: Any, tiles: _Tiles, ahead: Array, sums: tuple[Array, Array], c: float, interpret: Any
) -> tuple[Array, Array]:
    """Adds a query tile to d_k / scale and d_v, both [64, D]; `ahead` is the first key's position minus the first query's."""
    d_k, d_v = sums
    dtype = k_tile.dtype

    def weigh(scores: Array) -> Array:
        lse = plgpu.load(tiles.statistics.at[0], layout=COLUMN_VECTOR)
        return jnp.exp2(_mask(scores * c - _along_rows(lse, scores), ahead))

    def differentiate(weights: Array, d_weights: Array) -> Array:
        delta = plgpu.load(tiles.statistics.at[1], layout=COLUMN_VECTOR)
        return weights * (d_weights - _along_rows(delta, weights))

    if interpret:
        weights = weigh(product(k_tile, tiles.q))
        d_v = accumulate(d_v, weights.astype(dtype), tiles.d_out, interpret)
        d_scores = differentiate(weights, product(v_tile, tiles.d_out))
        return accumulate(d_k, d_scores.astype(dtype), tiles.q, interpret), d_v

    def overlapped(scores_ref: Any, d_weights_ref: Any, d_k_ref: Any, d_v_ref: Any) -> tuple[Array, Array]:
        d_k_ref[...], d_v_ref[...] = d_k, d_v
        plgpu.wgmma(scores_ref, k_tile, tiles.q.transpose((1, 0)))
        plgpu.wgmma(d_weights_ref, v_tile, tiles.d_out.transpose((1, 0)))
        weights = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        left = weights.astype(dtype)
        plgpu.wgmma(d_v_ref, left, tiles.d_out)
        d_weights = plgpu.wgmma_accumulator_load(d_weights_ref, wait_n=1)
        d_scores = differentiate(weights, d_weights).astype(dtype)
        plgpu.wgmma(d_k_ref, d_scores, tiles.q)
        return d_k_ref[...], d_v_ref[...]

    widths = QUERIES, QUERIES, d_k.shape[1], d_v.shape[1]
    return pl.run_scoped(overlapped, *(accumulator((KEYS, width), jnp.float32) for width in widths))


def _mask(scores: Array, ahead: Array) -> Array:
    """Scores [keys, queries] with -inf where a query does not see a key."""
    first = ahead + plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=ROW_VECTOR)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    # This is column >= first, as a comparison of constants with one number per row, see `flash_tiles.mask`.
    thread = column & 6
    return jnp.where((column - thread) >= columns(first, scores) - thread, scores, -jnp.inf)


def _along_rows(column_values: Array, like: Array) -> Array:
    """One value per column, broadcast to the rows of a matrix."""
    return lax.broadcast_in_dim(column_values, like.shape, [1])

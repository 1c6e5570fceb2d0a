"""What the Mosaic GPU kernels of attention share: 64 queries of one head against tiles of 64 or 128 keys.

That is what one matrix product takes. Scores are kept in base 2, scaled by c = scale * log2(e), since the hardware has exp2 alone.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

QUERIES = 64  # of a tile: the rows of one warpgroup's matrix product
LOG2_E = math.log2(math.e)

i32 = jnp.int32
MATRIX = plgpu.Layout.WGMMA
ROWS = MATRIX.reduce(1)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """Sums over the keys so far, in registers: out [64, D], maximum and total [64], float32."""

    out: Array
    maximum: Array
    total: Array

    @classmethod
    def empty(cls, head_dim: int) -> "Softmax":
        out = plgpu.layout_cast(jnp.full((QUERIES, head_dim), 0, jnp.float32), MATRIX)
        lowest = jnp.finfo(jnp.float32).min  # not -inf: where all scores are, their difference is NaN
        maximum = plgpu.layout_cast(jnp.full((QUERIES,), lowest, jnp.float32), ROWS)
        return cls(out, maximum, plgpu.layout_cast(jnp.full((QUERIES,), 0, jnp.float32), ROWS))

    def add(self, scores: Array, c: float, largest: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Takes scores in: (maximum, total, weights, factor on `out`). `largest` is each row's maximum, where it is known."""
        largest = scores.max(axis=1) if largest is None else largest
        maximum = jnp.maximum(self.maximum, largest * c)
        weights = jnp.exp2(scores * c - columns(maximum, scores))
        factor = jnp.exp2(self.maximum - maximum)
        return maximum, self.total * factor + weights.sum(axis=1), weights, factor

    def finish(self, seen: Array) -> tuple[Array, Array]:
        """Output and lse; 0 and -inf for the queries [64] that have not seen a key."""
        seen &= self.total > 0
        inverse = 1 / jnp.where(seen, self.total, 1)
        out = jnp.where(columns(seen, self.out), self.out * columns(inverse, self.out), 0)
        lse = (self.maximum + jnp.log2(jnp.where(seen, self.total, 1))) / LOG2_E
        return out, jnp.where(seen, lse, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Rings:
    """Tiles of 128 keys and their values on the way from the warpgroup that loads them to those that compute.

    Attributes:
      k_tiles, v_tiles: [slots, 128, D] in shared memory.
      k_ready, v_ready: barriers of the copies into a tile.
      k_free, v_free: barriers of the consumers that have read a tile.
    """

    k_tiles: Any
    v_tiles: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any

    def first(self, q: Any, slot: Array, head_dim: int, weigh: Callable[..., tuple]) -> tuple[Softmax, Array]:
        """The softmax after the first tile and its weights, the values of which are not in yet.

        `weigh(scores, state)` gives (maximum, total, weights in the dtype of the values, factor on `out`).
        """
        plgpu.barrier_wait(self.k_ready.at[slot])
        scores = product(q, self.k_tiles.at[slot])
        plgpu.barrier_arrive(self.k_free.at[slot])
        state = Softmax.empty(head_dim)
        maximum, total, weights, _ = weigh(scores, state)
        return Softmax(state.out, maximum, total), weights

    def step(
        self,
        q: Any,
        slots: tuple[Array, Array],
        carry: tuple[Softmax, Array],
        weigh: Callable[..., tuple],
        interpret: Any,
    ) -> tuple[Softmax, Array]:
        """Scores of a tile, while the values of the tile before are added under its softmax; `slots` are the tiles' places."""
        state, weights = carry
        k_slot, v_slot = slots
        k_tile, v_tile = self.k_tiles.at[k_slot], self.v_tiles.at[v_slot]
        plgpu.barrier_wait(self.k_ready.at[k_slot])
        plgpu.barrier_wait(self.v_ready.at[v_slot])
        if interpret:
            scores = product(q, k_tile)
            plgpu.barrier_arrive(self.k_free.at[k_slot])
            maximum, total, new_weights, factor = weigh(scores, state)
            out = accumulate(state.out, weights, v_tile, interpret)
            plgpu.barrier_arrive(self.v_free.at[v_slot])
            return Softmax(out * columns(factor, out), maximum, total), new_weights

        def overlapped(scores_ref: Any, out_ref: Any) -> tuple[Softmax, Array]:
            out_ref[...] = state.out
            plgpu.wgmma(scores_ref, q, k_tile.transpose((1, 0)))
            plgpu.wgmma(out_ref, weights, v_tile)
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(self.k_free.at[k_slot])
            taken = lax.optimization_barrier(weigh(scores, state))
            maximum, total, new_weights, factor = taken
            out = out_ref[...]
            # The old weights must outlive the wait: else the new ones get their registers while the product still
            # reads them, and ptxas makes the products wait for each other.
            _, new_weights = lax.optimization_barrier((weights, new_weights))
            plgpu.barrier_arrive(self.v_free.at[v_slot])
            return Softmax(out * columns(factor, out), maximum, total), new_weights

        sizes = k_tile.shape[0], v_tile.shape[1]
        return pl.run_scoped(overlapped, *(accumulator((QUERIES, n), jnp.float32) for n in sizes))

    def last(self, slot: Array, carry: tuple[Softmax, Array], interpret: Any) -> Softmax:
        """The softmax with the values of the last tile."""
        state, weights = carry
        plgpu.barrier_wait(self.v_ready.at[slot])
        out = accumulate(state.out, weights, self.v_tiles.at[slot], interpret)
        plgpu.barrier_arrive(self.v_free.at[slot])
        return dataclasses.replace(state, out=out)


def positive_scale(q: Array, scale: float) -> tuple[Array, float]:
    """The same scores with a scale above 0: the kernels take the maximum of the scores before they scale them."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)


def mask(scores: Array, visible: Array, first: Array | None = None) -> Array:
    """-inf for the keys that a query must not see.

    Args:
      scores: [64, W].
      visible: [64], how many columns from the first on each query may see.
      first: columns before this one are hidden from all of them.
    """
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    # column < visible, as a comparison of constants with one number per row: bits 1 and 2 of a column are the thread's, the
    # others the register's. Columns kept in registers would cost a quarter of the CTAs of the solo kernel.
    thread = column & 6
    seen = (column - thread) < columns(visible, scores) - thread
    if first is not None:
        seen &= (column - thread) >= first - thread
    return jnp.where(seen, scores, -jnp.inf)


def columns(row_values: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(row_values, like.shape, [0])


def product(q: Any, k_tile: Any) -> Array:
    """q k^T; q in shared memory or registers."""

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q, k_tile.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, accumulator((QUERIES, k_tile.shape[0]), jnp.float32))


def accumulate(out: Array, weights: Array, v_tile: Any, interpret: Any) -> Array:
    """out + weights v; weights in registers."""
    if interpret:  # the interpreter has no accumulators with a start value
        v = v_tile[...]
        plgpu.commit_smem()  # a plain read must be over before the copy engine writes there again
        return out + jnp.dot(weights.astype(jnp.float32), v.astype(jnp.float32))
    multiply: Any = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v_tile))
    return multiply(accumulator.init(out))


def tile(*shape_and_dtype: Any) -> Any:
    *shape, dtype = shape_and_dtype
    return plgpu.SMEM(tuple(shape), dtype, transforms=TILED)

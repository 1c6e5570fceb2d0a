"""What the Mosaic GPU kernels of attention share: FlashAttention of 64 queries of one head over tiles of 64 or 128 keys.

64 queries are the rows of a warpgroup's matrix product. Scores are in base 2, scaled by c = scale * log2(e), since the hardware
computes exp2.
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

QUERIES = 64  # queries of a tile, the rows of a warpgroup's matrix product
LOG2_E = math.log2(math.e)

i32 = jnp.int32
MATRIX = plgpu.Layout.WGMMA
ROW_VECTOR = MATRIX.reduce(1)  # one element per row
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """Running sums over keys, in registers: out [64, D], maximum and total [64], float32."""

    out: Array
    maximum: Array
    total: Array

    @classmethod
    def empty(cls, head_dim: int) -> "Softmax":
        out = plgpu.layout_cast(jnp.full((QUERIES, head_dim), 0, jnp.float32), MATRIX)
        # Not -inf: where every score is -inf, the difference of the two would be NaN.
        lowest = jnp.finfo(jnp.float32).min
        maximum = plgpu.layout_cast(jnp.full((QUERIES,), lowest, jnp.float32), ROW_VECTOR)
        return cls(out, maximum, plgpu.layout_cast(jnp.full((QUERIES,), 0, jnp.float32), ROW_VECTOR))

    def add(self, scores: Array, c: float, largest: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Adds scores: (maximum, total, weights, factor on `out`). `largest` is the maximum of each row if it is known."""
        maximum, weights, factor = self.weigh(scores, c, largest)
        return maximum, self.total * factor + weights.sum(axis=1), weights, factor

    def weigh(self, scores: Array, c: float, largest: Array | None = None) -> tuple[Array, Array, Array]:
        """As `add`, without the total: (maximum, weights, factor)."""
        largest = scores.max(axis=1) if largest is None else largest
        maximum = jnp.maximum(self.maximum, largest * c)
        weights = jnp.exp2(scores * c - columns(maximum, scores))
        factor = jnp.exp2(self.maximum - maximum)
        return maximum, weights, factor

    def finish(self, seen: Array) -> tuple[Array, Array]:
        """Output and lse; 0 and -inf for queries outside `seen` [64] and for those that have seen no key."""
        seen &= self.total > 0
        inverse = 1 / jnp.where(seen, self.total, 1)
        out = jnp.where(columns(seen, self.out), self.out * columns(inverse, self.out), 0)
        lse = (self.maximum + jnp.log2(jnp.where(seen, self.total, 1))) / LOG2_E
        return out, jnp.where(seen, lse, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Rings:
    """Ring buffers of tiles of 128 keys and values, filled by a producer warpgroup and read by consumer warpgroups.

    Attributes:
      k_tiles, v_tiles: [stages, 128, D] in shared memory.
      k_ready, v_ready: barriers on which the copies into a tile arrive.
      k_free, v_free: barriers on which the consumers arrive that have read a tile.
    """

    k_tiles: Any
    v_tiles: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any

    def first(self, q: Any, stage: Array, head_dim: int, weigh: Callable[..., tuple]) -> tuple[Softmax, Array]:
        """The softmax after the first tile, without its values, and the weights of these.

        `weigh(scores, state)` returns (maximum, total, weights in the dtype of the values, factor on `out`).
        """
        plgpu.barrier_wait(self.k_ready.at[stage])
        scores = product(q, self.k_tiles.at[stage])
        plgpu.barrier_arrive(self.k_free.at[stage])
        state = Softmax.empty(head_dim)
        maximum, total, weights, _ = weigh(scores, state)
        return Softmax(state.out, maximum, total), weights

    def step(
        self,
        q: Any,
        stages: tuple[Array, Array],
        carry: tuple[Softmax, Array],
        weigh: Callable[..., tuple],
        interpret: Any,
    ) -> tuple[Softmax, Array]:
        """Computes the scores of a tile while the values of the previous tile are accumulated.

        Args:
          q: the queries, in shared memory or registers.
          stages: of the tile of keys, and of the previous tile's values.
          carry: the softmax without the values of the previous tile, and the weights of these.
          weigh: see `first`.
          interpret: settings of JAX's interpreter, None on a GPU.
        """
        state, weights = carry
        k_stage, v_stage = stages
        k_tile, v_tile = self.k_tiles.at[k_stage], self.v_tiles.at[v_stage]
        plgpu.barrier_wait(self.k_ready.at[k_stage])
        plgpu.barrier_wait(self.v_ready.at[v_stage])
        if interpret:
            scores = product(q, k_tile)
            plgpu.barrier_arrive(self.k_free.at[k_stage])
            maximum, total, new_weights, factor = weigh(scores, state)
            out = accumulate(state.out, weights, v_tile, interpret)
            plgpu.barrier_arrive(self.v_free.at[v_stage])
            return Softmax(out * columns(factor, out), maximum, total), new_weights

        def overlapped(scores_ref: Any, out_ref: Any) -> tuple[Softmax, Array]:
            out_ref[...] = state.out
            plgpu.wgmma(scores_ref, q, k_tile.transpose((1, 0)))
            plgpu.wgmma(out_ref, weights, v_tile)
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(self.k_free.at[k_stage])
            taken = lax.optimization_barrier(weigh(scores, state))
            maximum, total, new_weights, factor = taken
            out = out_ref[...]
            # The old weights must outlive the wait: otherwise the new ones get their registers while the product still
            # reads them, and ptxas serializes the products.
            _, new_weights = lax.optimization_barrier((weights, new_weights))
            plgpu.barrier_arrive(self.v_free.at[v_stage])
            return Softmax(out * columns(factor, out), maximum, total), new_weights

        sizes = k_tile.shape[0], v_tile.shape[1]
        return pl.run_scoped(overlapped, *(accumulator((QUERIES, n), jnp.float32) for n in sizes))

    def skipping_step(
        self,
        q: Any,
        stages: tuple[Array, Array],
        carry: tuple[Softmax, Array, Array],
        has_previous: Array,
        weigh: Callable[..., tuple],
        interpret: Any,
    ) -> tuple[Softmax, Array, Array]:
        """As `step`, for tiles that may be skipped.

        Args:
          q, stages, interpret: as in `step`.
          carry: as in `step`, and the number of blocks of the previous tile that were not skipped.
          has_previous: whether there is a previous tile.
          weigh: `weigh(scores, state, weights)` returns (maximum, total, weights in the dtype of the values, factor on `out`, number
            of blocks that are not skipped). The weights of a skipped tile may be anything.
        """
        state, weights, previous = carry
        k_stage, v_stage = stages
        k_tile, v_tile = self.k_tiles.at[k_stage], self.v_tiles.at[v_stage]
        plgpu.barrier_wait(self.k_ready.at[k_stage])

        def alone() -> tuple[Softmax, Array, Array]:
            scores = product(q, k_tile)
            plgpu.barrier_arrive(self.k_free.at[k_stage])

            @pl.when(has_previous)
            def _():
                plgpu.barrier_wait(self.v_ready.at[v_stage])
                plgpu.barrier_arrive(self.v_free.at[v_stage])

            maximum, total, new_weights, factor, needed = weigh(scores, state, weights)
            return Softmax(state.out * columns(factor, state.out), maximum, total), new_weights, needed

        def both() -> tuple[Softmax, Array, Array]:
            plgpu.barrier_wait(self.v_ready.at[v_stage])
            if interpret:
                scores = product(q, k_tile)
                plgpu.barrier_arrive(self.k_free.at[k_stage])
                maximum, total, new_weights, factor, needed = weigh(scores, state, weights)
                out = accumulate(state.out, weights, v_tile, interpret)
                plgpu.barrier_arrive(self.v_free.at[v_stage])
                return Softmax(out * columns(factor, out), maximum, total), new_weights, needed

            def overlapped(scores_ref: Any, out_ref: Any) -> tuple[Softmax, Array, Array]:
                out_ref[...] = state.out
                plgpu.wgmma(scores_ref, q, k_tile.transpose((1, 0)))
                plgpu.wgmma(out_ref, weights, v_tile)
                scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                plgpu.barrier_arrive(self.k_free.at[k_stage])
                maximum, total, new_weights, factor, needed = lax.optimization_barrier(weigh(scores, state, weights))
                out = out_ref[...]
                _, new_weights = lax.optimization_barrier((weights, new_weights))  # as in `step`
                plgpu.barrier_arrive(self.v_free.at[v_stage])
                return Softmax(out * columns(factor, out), maximum, total), new_weights, needed

            sizes = k_tile.shape[0], v_tile.shape[1]
            return pl.run_scoped(overlapped, *(accumulator((QUERIES, n), jnp.float32) for n in sizes))

        return lax.cond(previous > 0, both, alone)

    def skipping_last(self, stage: Array, carry: tuple[Softmax, Array, Array], interpret: Any) -> Softmax:
        """As `last`, for a tile that may have been skipped."""
        state, weights, previous = carry
        plgpu.barrier_wait(self.v_ready.at[stage])
        v_tile = self.v_tiles.at[stage]
        out = lax.cond(previous > 0, lambda: accumulate(state.out, weights, v_tile, interpret), lambda: state.out)
        plgpu.barrier_arrive(self.v_free.at[stage])
        return dataclasses.replace(state, out=out)

    def last(self, stage: Array, carry: tuple[Softmax, Array], interpret: Any) -> Softmax:
        """The softmax with the values of the last tile."""
        state, weights = carry
        plgpu.barrier_wait(self.v_ready.at[stage])
        out = accumulate(state.out, weights, self.v_tiles.at[stage], interpret)
        plgpu.barrier_arrive(self.v_free.at[stage])
        return dataclasses.replace(state, out=out)


def positive_scale(q: Array, scale: float) -> tuple[Array, float]:
    """Queries and a scale above 0 that give the same scores: kernels take the maximum of scores before scaling them."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)


def mask(scores: Array, visible: Array, first: Array | None = None) -> Array:
    """Scores with -inf for the keys that a query does not see.

    Args:
      scores: [64, W].
      visible: [64], number of leading columns that each query sees.
      first: columns before this one are hidden from all queries.
    """
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    # This is column < visible, as a comparison of constants with one number per row: bits 1 and 2 of a column depend on the thread,
    # the others on the register. Columns held in registers would cost the single-warpgroup kernel a quarter of its CTAs.
    thread = column & 6
    seen = (column - thread) < columns(visible, scores) - thread
    if first is not None:
        seen &= (column - thread) >= first - thread
    return jnp.where(seen, scores, -jnp.inf)


def columns(row_values: Array, like: Array) -> Array:
    """One value per row, broadcast to the columns of a matrix."""
    return lax.broadcast_in_dim(row_values, like.shape, [0])


def product(q: Any, k_tile: Any) -> Array:
    """q k^T; q in shared memory or registers."""

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q, k_tile.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, accumulator((QUERIES, k_tile.shape[0]), jnp.float32))


def accumulate(out: Array, weights: Array, v_tile: Any, interpret: Any) -> Array:
    """out + weights v; weights in registers."""
    if interpret:
        # The interpreter has no accumulators with an initial value.
        v = v_tile[...]
        plgpu.commit_smem()  # orders the plain read before TMA's next write to the tile
        return out + jnp.dot(weights.astype(jnp.float32), v.astype(jnp.float32))
    multiply: Any = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v_tile))
    return multiply(accumulator.init(out))


def tile(*shape_and_dtype: Any) -> Any:
    """Shared memory of a shape and dtype, in the layout that matrix products read."""
    *shape, dtype = shape_and_dtype
    return plgpu.SMEM(tuple(shape), dtype, transforms=TILED)

"""What the four warps of a tile hold: a row each, or a quarter of a longer row, whose sums then pass between warps. For `mosaic_gpu.py`."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32, Shaped

from pallas_kernels.gate_selection.warp_rows import ROW_VECTOR, WARPS, drop_repeats


@dataclasses.dataclass(frozen=True)
class RowParts:
    """Reductions over rows of a tile [4, W], one element [4] for each warp: of its row.

    Attributes:
      quarters: whether the warps hold the quarters of one row, in ascending order; otherwise each has a row of its own.
      interpreted: whether JAX's interpreter runs the kernel.
    """

    quarters: bool
    interpreted: bool

    def sum(self, x: Shaped[Array, "4 W"]) -> Shaped[Array, "4"]:
        """Sum of each warp's row."""
        return self.joined(x.sum(axis=1), jnp.sum)

    def max(self, x: Shaped[Array, "4 W"]) -> Shaped[Array, "4"]:
        """Largest entry of each warp's row."""
        return self.joined(x.max(axis=1), jnp.max)

    def joined(self, parts: Shaped[Array, "4"], reduce: Callable[[Array], Array]) -> Shaped[Array, "4"]:
        """What the warps found, each in what it holds, for the rows. Waits for the other warps where they hold quarters."""
        if not self.quarters:
            return parts
        return plgpu.layout_cast(jnp.broadcast_to(reduce(parts), (WARPS,)), ROW_VECTOR)

    def before(self, parts: Int32[Array, "4"]) -> Int32[Array, "4"]:
        """Sum of what the warps of earlier quarters have."""
        warp = self.numbers()
        sums = [self.joined(jnp.where(warp == earlier, parts, 0), jnp.sum) for earlier in range(WARPS - 1)]
        return sum([jnp.where(warp > earlier, x, 0) for earlier, x in enumerate(sums)], jnp.zeros_like(parts))

    def numbers(self) -> Int32[Array, "4"]:
        """The number of each warp."""
        return plgpu.broadcasted_iota(jnp.int32, (WARPS,), 0, layout=ROW_VECTOR)

    def drop_repeats(
        self, x: Float32[Array, "4 W"], value: Float32[Array, "4"], wanted: Int32[Array, "4"]
    ) -> Float32[Array, "4 W"]:
        """x with -inf in place of all but the first `wanted` elements of a row that equal `value`."""
        if self.quarters:
            wanted -= self.before((x == value[:, None]).astype(jnp.int32).sum(axis=1))
        return drop_repeats(x, value, wanted, self.interpreted)

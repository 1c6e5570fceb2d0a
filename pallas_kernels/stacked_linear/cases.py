"""Named calls of `stacked_linear`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      inputs: `in`.
      outputs: number of outputs of each map.
      rows: R.
      layers: L; the call uses the last layer but one, if there is one.
      dtype: of x and weights.
    """

    name: str
    inputs: int
    outputs: tuple[int, ...]
    rows: int = 1
    layers: int = 3
    dtype: str = "bfloat16"

    @functools.partial(jax.jit, static_argnums=0)
    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call, with weights that preserve the scale of a vector."""
        shapes = {f"w{i}": (self.layers, n, self.inputs) for i, n in enumerate(self.outputs)}
        x, *weights = random_arrays(key, self.dtype, x=(self.rows, self.inputs), **shapes).values()
        weights = [w * self.inputs**-0.5 for w in weights]
        return {"x": x, "weights": weights, "layer": jnp.int32(max(0, self.layers - 2))}


REAL = tuple(
    Case(f"llama-3.1-8b-{name}-b{rows}", inputs, outputs, rows, layers=32)
    for rows in (1, 8, 64)
    for name, inputs, outputs in (
        ("qkv", 4096, (4096, 1024, 1024)),
        ("out", 4096, (4096,)),
        ("mlp-in", 4096, (14336, 14336)),
        ("mlp-out", 14336, (4096,)),
    )
)

TINY = (
    Case("one", 128, (64,)),
    Case("several", 384, (128, 64, 64), rows=3),
    Case("one-layer", 256, (64,), rows=9, layers=1),
    Case("long", 1024, (64,), rows=2, dtype="float16"),
)

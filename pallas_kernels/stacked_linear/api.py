"""`stacked_linear`: linear maps of one layer for few vectors, with weights stacked over layers."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import check_arrays

_run = Operation("stacked_linear", "pallas_kernels.stacked_linear", gradients="stacked_linear_gradients")


def stacked_linear(
    x: Float[Array, "R in"],
    weights: Sequence[Float[Array, "L _ in"]],
    layer: int | Int[Array, ""],
    *,
    implementation: Implementation | None = None,
) -> list[Float[Array, "R _"]]:
    """Applies several linear maps of one layer to the same vectors.

      y_i[r] = W_i[layer] x[r]

    A decoder that scans its layers slices one layer at a time out of such a stack. XLA's matrix products need the slice as an array
    of its own and copy it first, which takes a third of the time when single tokens are decoded. The kernel reads it in place.

    Sums run in float32. Differentiable in x and the weights.

    Args:
      x: few vectors, such as the newest tokens of a batch.
      weights: arrays of x's dtype that share L and `in`; each map has its own number of outputs.
      layer: index of the layer, 0 to L - 1.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; bfloat16 and float16, at most 64 vectors, `in` a multiple of
        128 and outputs of 64), or None for the fastest that takes these arguments on their device.

    Returns:
      y_i [R, out_i] of x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not match.
      NotImplementedError: the named implementation cannot do this.

    >>> y, z = stacked_linear(jnp.ones((1, 4)), [jnp.ones((3, 2, 4)), jnp.ones((3, 5, 4))], 2)
    >>> y.tolist(), z.shape
    ([[4.0, 4.0]], (1, 5))
    """
    name = "stacked_linear"
    check_arrays(name, x=x, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    if x.ndim != 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x must be floats [R, in], no axis empty; got {x.dtype} {x.shape}.")
    if not weights:
        raise ValueError(f"{name}: weights must be at least one array [L, out, in]; got none.")
    for w in weights:
        if w.ndim != 3 or 0 in w.shape or w.dtype != x.dtype or w.shape[::2] != (len(weights[0]), x.shape[1]):
            raise ValueError(
                f"{name}: weights must be [L, out, in] of x's dtype with the same L and in = {x.shape[1]}; "
                f"got {', '.join(f'{w.dtype} {w.shape}' for w in weights)} for x {x.dtype} {x.shape}."
            )
    layer = jnp.asarray(layer)
    if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(f"{name}: layer must be one integer; got {layer.dtype} {layer.shape}.")
    return _run(implementation, x, list(weights), layer.astype(jnp.int32))

"""Products of float32 arrays with the accuracy of float32, also on accelerators, whose default precision is lower."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from pallas_kernels import devices

TENSOR_CORE_ROWS = 2048  # vectors from which tensor cores are faster


def precise_einsum(equation: str, x: Float32[Array, "..."], y: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Einsum of two arrays with errors of about 2e-7 relative to the norms of the vectors that it multiplies.

    On GPUs with TF32, tensor cores compute it in three passes over TF32 parts, which is faster if x holds many vectors. Gradients
    take one pass there: an error of 5e-4 is below the sampling noise of the data, and these products take most of the time that
    a training step spends on gates.

    Args:
      equation: every index of x and y occurs in the result or in the other array.
    """
    return _differentiable(equation, x, y)  # pyright: ignore[reportReturnType]


def rounded(x: Float32[Array, "..."], dtype: DTypeLike) -> Float32[Array, "..."]:
    """x rounded to the precision of `dtype`, with 0 in place of its subnormal values.

    XLA would remove a conversion to `dtype` and back.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return _einsum(equation, x, y, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if _many(x) else None)


def _forward_rule(equation: str, x: jax.Array, y: jax.Array) -> tuple:
    return _differentiable(equation, x, y), (x, y)


def _backward_rule(equation: str, inputs: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple:
    (x, y), algorithm = inputs, jax.lax.DotAlgorithmPreset.TF32_TF32_F32 if _many(inputs[0]) else None
    arguments, result = equation.split("->")
    of_x, of_y = arguments.split(",")
    return (
        _einsum(f"{result},{of_y}->{of_x}", cotangent, y, algorithm),
        _einsum(f"{of_x},{result}->{of_y}", x, cotangent, algorithm),
    )


_differentiable.defvjp(_forward_rule, _backward_rule)


def _einsum(equation: str, x: jax.Array, y: jax.Array, algorithm: jax.lax.DotAlgorithmPreset | None) -> jax.Array:
    if algorithm is None or not devices.has_tf32():
        return _plain_einsum(equation, x, y)
    return _tensor_core_einsum(equation, algorithm, x, y)


def _plain_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tensor_core_einsum(equation: str, algorithm: jax.lax.DotAlgorithmPreset, x: jax.Array, y: jax.Array) -> jax.Array:
    """Einsum that uses the algorithm if it is lowered for GPUs."""
    einsum = functools.partial(jnp.einsum, equation, precision=algorithm, preferred_element_type=jnp.float32)
    return jax.lax.platform_dependent(x, y, cuda=einsum, default=functools.partial(_plain_einsum, equation))


def _many(x: jax.Array) -> bool:
    """Whether x holds enough vectors for tensor cores to be faster."""
    return x.size // x.shape[-1] >= TENSOR_CORE_ROWS

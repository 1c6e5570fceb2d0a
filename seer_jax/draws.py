"""Random numbers that new weights start from."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray


@functools.partial(jax.jit, static_argnames="shape")
def standard_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """`jax.random.normal` of the same key and shape, drawn along one axis: along five it takes XLA nine times as long to compile."""
    return jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)

"""`stacked_linear` in XLA, for any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.jit
def stacked_linear(
    x: Float[Array, "R in"], weights: list[Float[Array, "L _ in"]], layer: Int[Array, ""]
) -> list[Float[Array, "R _"]]:
    """See the function of this name in api.py."""
    return [jnp.einsum("ri,oi->ro", x, w[layer]) for w in weights]


@jax.jit
def stacked_linear_gradients(
    cotangents: list[Float[Array, "R _"]],
    x: Float[Array, "R in"],
    weights: list[Float[Array, "L _ in"]],
    layer: Int[Array, ""],
) -> tuple[Array, ...]:
    """Gradients in x and each of the weights."""
    in_x, in_weights = jax.vjp(lambda x, weights: stacked_linear(x, weights, layer), x, weights)[1](cotangents)
    return in_x, *in_weights

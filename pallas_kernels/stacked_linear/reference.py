"""The definition of `stacked_linear` in plain float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def stacked_linear(
    x: Float[Array, "R in"], weights: list[Float[Array, "L _ in"]], layer: Int[Array, ""]
) -> list[Float[Array, "R _"]]:
    """See the function of this name in api.py."""
    x32 = x.astype(jnp.float32)
    products = [jnp.einsum("ri,oi->ro", x32, w[layer].astype(jnp.float32), precision="highest") for w in weights]
    return [y.astype(x.dtype) for y in products]

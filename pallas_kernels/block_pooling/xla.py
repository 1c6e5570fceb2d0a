"""`pool_blocks` in XLA, for any device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


@functools.partial(jax.jit, static_argnames=("kinds", "block_size"))
def pool_blocks(
    x: Float[Array, "B T heads D"], *, kinds: tuple[str, ...], block_size: int, valid: Bool[Array, "#B T"] | None
) -> Float32[Array, "B Tb heads P"]:
    """See the function of this name in api.py."""
    batch, tokens, heads, dim = x.shape
    pad = -tokens % block_size
    valid = jnp.ones((1, tokens), bool) if valid is None else valid
    valid = jnp.broadcast_to(jnp.pad(valid, ((0, 0), (0, pad))), (batch, tokens + pad)).reshape(-1, block_size, 1)
    # As matrices [blocks, b, channels]: for more axes XLA first writes a transposed float32 copy on GPUs.
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(-1, block_size, heads * dim).astype(jnp.float32)
    count = valid.sum(1)
    pools = {
        "max": lambda: jnp.where(valid, x, -jnp.inf).max(1),
        "min": lambda: jnp.where(valid, x, jnp.inf).min(1),
        "avg": lambda: jnp.where(valid, x, 0).sum(1) / jnp.maximum(count, 1),
    }
    pooled = [jnp.where(count > 0, pools[kind](), 0).reshape(batch, -1, heads, dim) for kind in kinds]
    return jnp.concatenate(pooled, axis=-1)


def pool_blocks_gradients(
    cotangent: Float32[Array, "B Tb heads P"],
    x: Float[Array, "B T heads D"],
    *,
    kinds: tuple[str, ...],
    block_size: int,
    valid: Bool[Array, "#B T"] | None,
) -> tuple[Float[Array, "B T heads D"]]:
    """The gradient in x."""
    return jax.vjp(lambda x: pool_blocks(x, kinds=kinds, block_size=block_size, valid=valid), x)[1](cotangent)

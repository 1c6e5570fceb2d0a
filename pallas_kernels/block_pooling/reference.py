"""The definition of `pool_blocks` in plain float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def pool_blocks(
    x: Float[Array, "B T heads D"], *, kinds: tuple[str, ...], block_size: int, valid: Bool[Array, "#B T"] | None
) -> Float32[Array, "B Tb heads P"]:
    """See the function of this name in api.py."""
    batch, tokens, heads, dim = x.shape
    pad = -tokens % block_size
    valid = jnp.ones((1, tokens), bool) if valid is None else valid
    valid = jnp.pad(valid, ((0, 0), (0, pad))).reshape(len(valid), -1, block_size, 1, 1)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(batch, -1, block_size, heads, dim)
    count = valid.sum(2)
    pools = {
        "max": jnp.where(valid, x, -jnp.inf).max(2),
        "min": jnp.where(valid, x, jnp.inf).min(2),
        "avg": jnp.where(valid, x, 0).sum(2) / jnp.maximum(count, 1),
    }
    return jnp.concatenate([jnp.where(count > 0, pools[kind], 0) for kind in kinds], axis=-1)

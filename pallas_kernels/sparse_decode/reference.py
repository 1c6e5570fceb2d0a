"""The definition of `sparse_decode_attention` in plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.blocks import BlockIndices


def sparse_decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    *,
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"],
    scale: float,
) -> tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """See the function of this name in api.py."""
    num_keys, group = k.shape[1], q.shape[1] // k.shape[2]
    inside = (jnp.arange(num_keys)[None] < lengths[:, None])[..., None, None]
    k, v = (jnp.where(inside, x[cache_rows].astype(jnp.float32), 0) for x in (k, v))  # padding may hold anything
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    mask = jnp.broadcast_to(
        (jnp.arange(num_keys)[None] < lengths[:, None])[:, None], (*q.shape[:2], num_keys)
    )  # [B, H, S]
    if blocks is not None:
        listed = blocks.to_mask(-(-num_keys // blocks.block_size))  # [B, K, Sb]
        listed = jnp.repeat(listed, blocks.block_size, axis=2)[:, :, :num_keys]
        mask &= jnp.repeat(listed, group, axis=1)

    scores = scale * jnp.einsum("bhd,bshd->bhs", q.astype(jnp.float32), k, precision="highest")
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None]), 0)
    out = jnp.einsum("bhs,bshd->bhd", weights, v, precision="highest")
    return out.astype(q.dtype), lse

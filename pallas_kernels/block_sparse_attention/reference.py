"""The definition of `block_sparse_attention` in plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.blocks import BlockIndices


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None = None,
    padded: bool = True,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    """See the function of this name in api.py. `density` and `padded` have no effect."""
    (_, num_queries, heads, _), num_keys, b = q.shape, k.shape[1], blocks.block_size
    inside = (jnp.arange(num_keys)[None] < lengths[:, None])[..., None, None]
    k, v = (jnp.where(inside, x.astype(jnp.float32), 0) for x in (k, v))  # padding may hold anything
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))

    listed = blocks.to_mask(-(-num_keys // b))  # [B, Hs, Tb, Sb]
    listed = jnp.repeat(jnp.repeat(listed, b, axis=2), b, axis=3)[:, :, :num_queries, :num_keys]
    listed = jnp.repeat(listed, heads // listed.shape[1], axis=1)  # [B, H, T, S]
    query = (query_offset[:, None] + jnp.arange(num_queries)[None])[:, None, :, None]  # positions, [B, 1, T, 1]
    key = jnp.arange(num_keys)[None, None, None]
    length = lengths[:, None, None, None]
    mask = listed & (key <= query) & (key < length) & (query < length)

    scores = scale * jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k, precision="highest")
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None]), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    return out.astype(q.dtype), lse.transpose(0, 2, 1)

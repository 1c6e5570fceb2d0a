"""The definition of `block_sparse_attention` in plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels.block_sparse_attention.skipping import tile_queries
from pallas_kernels.blocks import BlockIndices


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None = None,
    padded: bool = True,
    skip_threshold: Float32[Array, "H"] | None = None,
    cache_rows: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], Int32[Array, "B H tiles"] | None]:
    """See the function of this name in api.py. `density` and `padded` have no effect."""
    (_, num_queries, heads, _), num_keys, b = q.shape, k.shape[1], blocks.block_size
    if cache_rows is not None:
        k, v = k[cache_rows], v[cache_rows]
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
    kept = None
    if skip_threshold is not None:
        computed = computed_blocks(scores, b, skip_threshold)
        kept = computed.sum(-1, dtype=jnp.int32)
        computed = jnp.repeat(jnp.repeat(computed, tile_queries(b), axis=2), b, axis=3)[:, :, :num_queries, :num_keys]
        mask &= computed
        scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None]), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
    return out.astype(q.dtype), lse.transpose(0, 2, 1), kept


def computed_blocks(
    scores: Float32[Array, "B H T S"], b: int, skip_threshold: Float32[Array, "H"]
) -> Bool[Array, "B H tiles Sb"]:
    """Which blocks each tile of queries does not skip, from scores that are -inf for keys that a query does not see.

    A query needs a block of which it sees a key, unless exp(its largest score there - its largest score in the blocks before) <
    lambda. A tile skips the blocks that none of its queries needs.
    """
    (batch, heads, num_queries, num_keys), tile = scores.shape, tile_queries(b)
    edges = (0, 0), (0, 0), (0, -num_queries % tile), (0, -num_keys % b)
    scores = jnp.pad(scores, edges, constant_values=-jnp.inf)
    largest = scores.reshape(batch, heads, scores.shape[2], -1, b).max(-1)
    # A block that was skipped did not raise the maximum of any query: all blocks before count alike.
    before = jax.lax.cummax(largest, axis=3)[..., :-1]
    before = jnp.concatenate([jnp.full_like(largest[..., :1], -jnp.inf), before], axis=3)
    negligible = largest < before + jnp.log(skip_threshold)[None, :, None, None]
    needed = (largest != -jnp.inf) & ~negligible
    return needed.reshape(batch, heads, -1, tile, needed.shape[-1]).any(3)

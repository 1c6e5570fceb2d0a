"""The definition of `attention_with_block_scores` in plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def _normalise(scores: Float32[Array, "... Sb"]) -> Float32[Array, "... Sb"]:
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)


def attention_with_block_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    block_size: int,
    scale: float,
    block_scores: bool,
    token_scores: bool,
    statistic: str,
    segment_ids: Int[Array, "B S"],
    query_offset: Int[Array, ""],
) -> tuple:
    """See the function of this name in api.py; padding has segment id 0."""
    (batch, length, heads, _), (_, keys, kv_heads, _), b = q.shape, k.shape, block_size
    inside = (segment_ids > 0)[..., None, None]
    k, v = (jnp.where(inside, x.astype(jnp.float32), 0) for x in (k, v))  # padding may hold anything
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    t, s = query_offset + jnp.arange(length), jnp.arange(keys)
    ids = segment_ids[:, t]
    same = (ids[:, :, None] == segment_ids[:, None, :]) & (ids > 0)[:, :, None]
    mask = (same & (s[None] <= t[:, None])[None])[:, None]  # [B, 1, T, S]

    scores = scale * jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k, precision="highest")
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None]), 0)
    output = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest").astype(q.dtype)

    rows, blocks = -(-length // b), -(-keys // b)
    tiles = jnp.pad(weights, ((0, 0), (0, 0), (0, rows * b - length), (0, blocks * b - keys)))
    tiles = tiles.reshape(batch, kv_heads, heads // kv_heads, rows, b, blocks, b)
    if statistic == "mass":
        per_query = tiles.sum(-1)  # [B, K, G, Tb, b, Sb]
        per_token = per_query.mean(2)
    else:
        per_query = tiles.max(-1)
        per_token = per_query.max(2)
    per_block = per_query.max(4).reshape(batch, heads, rows, blocks)
    per_token = per_token.reshape(batch, kv_heads, rows * b, blocks)[:, :, :length]
    completed = (jnp.arange(blocks)[None] < t[:, None] // b)[None, None]  # [1, 1, T, Sb]
    return (
        output,
        lse.transpose(0, 2, 1),
        _normalise(per_block) if block_scores else None,
        _normalise(jnp.where(completed, per_token, 0)) if token_scores else None,
    )

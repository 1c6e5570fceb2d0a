"""Dense causal attention of prompts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_CHUNK = 256
CHUNKS_PER_SPAN = 4  # fewer waste less work on the future, more compile faster
MAX_SPANS = 8


def dense_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v with causality, differentiable; q and k after RoPE.

    Runs in cuDNN on GPUs where dtype and masks allow it, else in chunks of queries, so that no T x T array is made.

    Args:
      lengths: tokens of each row that count; later rows of the output are undefined but finite.
      segment_ids: tokens attend within their own segment (packed sequences).
    """
    if segment_ids is None and jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    # A causal row never sees beyond its own length, so `lengths` changes no row that counts.
    batch, tokens, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    size = min(QUERY_CHUNK, tokens)
    chunks = -(-tokens // size)
    queries = jnp.pad(q * dim**-0.5, ((0, 0), (0, chunks * size - tokens), (0, 0), (0, 0)))
    queries = queries.reshape(batch, chunks, size, kv_heads, group, dim).transpose(1, 0, 3, 4, 2, 5)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, D]: one matrix product per head

    @jax.checkpoint
    def attend(chunk: jax.Array, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        rows = jnp.minimum(chunk * size + jnp.arange(size), tokens - 1)
        mask = jnp.broadcast_to(rows[:, None] >= jnp.arange(keys.shape[2])[None], (batch, size, keys.shape[2]))
        if segment_ids is not None:
            mask &= segment_ids[:, rows, None] == segment_ids[:, None, : keys.shape[2]]
        folded = queries.reshape(batch, kv_heads, group * size, dim)
        logits = jnp.einsum("bkmd,bksd->bkms", folded, keys, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None], logits.reshape(*queries.shape[:-1], -1), -jnp.inf)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        weights = weights.reshape(*folded.shape[:-1], -1).astype(v.dtype)
        out = jnp.einsum("bkms,bksd->bkmd", weights, values, preferred_element_type=jnp.float32)
        return (out.reshape(queries.shape) / total).astype(q.dtype)

    parts = []
    step = max(CHUNKS_PER_SPAN, -(-chunks // MAX_SPANS))
    for first in range(0, chunks, step):
        last = min(first + step, chunks)
        span = slice(0, last * size)  # what lies after the span is in the future of all its queries
        scanned = (jnp.arange(first, last), queries[first:last])
        parts.append(jax.lax.map(lambda x, span=span: attend(*x, keys[:, :, span], values[:, :, span]), scanned))
    out = jnp.concatenate(parts).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, dim)[:, :tokens]

"""Attention of one layer: dense, block-sparse over a prompt, and of one new token against the cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    BlockIndices,
    attention_with_block_scores,
    block_sparse_attention,
    select_blocks,
    sparse_decode_attention,
)
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.gates.gate import DecodeGate, PrefillGate
from seer_jax.selection.policies import Dense, Given, Policy, RankingPolicy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Gate, Oracle, Random, Scorer, SinkWindow
from seer_jax.models.rope import apply_rope

QUERY_CHUNK = 256
CHUNKS_PER_SPAN = 4  # fewer waste less work on the future, more compile faster
MAX_SPANS = 8
DEFAULT_BLOCK_SIZE = 64


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


def rotate(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], positions: Int[Array, "#B T"], config: ModelConfig
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
    """RoPE on queries and keys."""
    return apply_rope(q, positions, config.rope), apply_rope(k, positions, config.rope)


def prefill_attention(
    policy: Policy,
    gate: PrefillGate | None,
    layer: Int[Array, ""],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    lengths: Int[Array, "B"],
    config: ModelConfig,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B"]]:
    """Attention of a prompt's tokens 0 .. T-1 to each other.

    Args:
      policy: which blocks are kept in this layer; its `dense_layers` are for who runs the layers.
      gate: of this layer, where the policy ranks by it.
      layer: index of this layer.
      q, k, v: before RoPE.
      lengths: tokens of each row that count; the rest is right padding.

    Returns:
      (output, keys after RoPE, share of the causal blocks that was kept in each row of the batch).
    """
    positions = jnp.arange(q.shape[1])[None]
    q_rotated, k_rotated = rotate(q, k, positions, config)
    if isinstance(policy, Dense):
        out = dense_attention(q_rotated, k_rotated, v, lengths=lengths)
        return out, k_rotated, jnp.ones(q.shape[0])
    b = block_size_of(policy, gate)
    num_blocks = -(-q.shape[1] // b)
    column, row = jnp.arange(num_blocks)[None, None, None], jnp.arange(num_blocks)[None, None, :, None]
    last = ((lengths - 1) // b)[:, None, None, None]  # block row that holds a sequence's last token
    visible = jnp.where(row <= last, row + 1, 0)
    if isinstance(policy, Given):
        mask = policy.mask[layer] & (column < visible)
        mask |= (column == row) & ~mask.any(-1, keepdims=True)  # a row that would keep no block keeps its diagonal
        blocks = select_blocks(jnp.full(mask.shape, -jnp.inf), block_size=b, keep=mask, visible=visible)
    else:
        logits = _prefill_logits(policy.scorer, gate, layer, (q, k, q_rotated, k_rotated, v), lengths, b)
        blocks = _select_prefill(policy, logits, visible, last, b)
    density = policy.density if isinstance(policy, TopK) else None
    out = block_sparse_attention(q_rotated, k_rotated, v, blocks, lengths=lengths, density=density)
    assert isinstance(out, jax.Array)  # without return_lse
    kept = blocks.counts.sum((1, 2)) / (blocks.counts.shape[1] * visible.sum((1, 2, 3)))
    return out, k_rotated, kept


def block_size_of(policy: Policy, gate: PrefillGate | DecodeGate | None) -> int:
    """b: the gate's where there is one, so that yardsticks are compared at the same size."""
    if isinstance(policy, Given):
        return policy.block_size
    return gate.config.block_size if gate is not None else DEFAULT_BLOCK_SIZE


def _select_prefill(
    policy: RankingPolicy,
    logits: Float[Array, "B Hs Tb Tb"],
    visible: Int[Array, "B 1 Tb 1"],
    last: Int[Array, "B 1 1 1"],
    block_size: int,
) -> BlockIndices:
    """Lists of a prompt.

    Args:
      logits: scores before softmax; may hold anything where a block is not visible.
      visible: how many blocks each row sees.
      last: block row that holds a sequence's last token.
    """
    num_blocks = logits.shape[-1]
    column, row = jnp.arange(num_blocks)[None, None, None], jnp.arange(num_blocks)[None, None, :, None]
    select = functools.partial(select_blocks, logits, block_size=block_size, visible=visible)
    match policy:
        case Threshold() | CumulativeMass() | TopK():
            keep = (column == row) | (row > last - policy.dense_last_rows)
            if isinstance(policy, Threshold):
                return select(threshold=policy.threshold, keep=keep)
            if isinstance(policy, CumulativeMass):
                return select(mass=policy.mass, keep=keep)
            # As many as a sequence's own length asks for, whatever the batch is padded to.
            counts = jnp.asarray([policy.blocks(n) for n in range(1, num_blocks + 1)])
            return select(top_k=counts[last], keep=keep)
        case TokenBudget():
            most, keep = policy.blocks(block_size), column == row
            if most > 1:  # a budget of one block is for the current one
                keep |= column == 0
            return select(max_blocks=most, keep=keep)


def _prefill_logits(
    scorer: Scorer,
    gate: PrefillGate | None,
    layer: Int[Array, ""],
    tensors: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    lengths: Int[Array, "B"],
    block_size: int,
) -> Float[Array, "B Hs Tb Tb"]:
    q, k, q_rotated, k_rotated, v = tensors
    batch, tokens, heads, _ = q.shape
    num_blocks = -(-tokens // block_size)
    match scorer:
        case Gate():
            if gate is None:
                raise ValueError(
                    "This policy ranks blocks by the prefill gate, but the model has none; load or train one."
                )
            positions = jnp.arange(tokens)[None]
            return gate.scores(q, k, positions, positions < lengths[:, None])
        case Oracle():
            scored = attention_with_block_scores(q_rotated, k_rotated, v, block_size=block_size, lengths=lengths)
            assert scored.block_scores is not None
            return jnp.log(scored.block_scores)
        case SinkWindow():
            return jnp.broadcast_to(_recency(num_blocks), (batch, 1, num_blocks, num_blocks))
        case Random():
            key = jax.random.fold_in(jax.random.key(scorer.seed), layer)
            return jax.random.uniform(key, (batch, heads, num_blocks, num_blocks))
    raise TypeError(f"Expected a scorer (Gate, Oracle, SinkWindow or Random); got {scorer!r}.")


def _recency(num_blocks: int) -> Float[Array, "Sb"]:
    """Ranks the first block above all, then the latest ones."""
    return jnp.arange(num_blocks).at[0].set(num_blocks).astype(jnp.float32)


def decode_attention(
    policy: Policy,
    gate: DecodeGate | None,
    layer: Int[Array, ""],
    q: Float[Array, "B 1 H D"],
    q_rotated: Float[Array, "B 1 H D"],
    cache: Cache,
) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B"]]:
    """Attention of one new token of each row to the cached ones, itself among them.

    Args:
      policy: which blocks are kept in this layer, current and first one always; its `dense_layers`, like the gate's
        `start_layer`, are for who runs the layers.
      gate: of this layer, where the policy ranks by it.
      layer: index of this layer.
      q, q_rotated: before and after RoPE.
      cache: of all layers; in this one the new token is already written, at position `cache.lengths`.

    Returns:
      (output, share of the visible blocks that was kept in each row of the batch).
    """
    blocks, kept = None, jnp.ones(q.shape[0])
    if not isinstance(policy, Dense):
        blocks = _select_decode(policy, gate, layer, q, q_rotated, cache)
        kept = blocks.counts.mean(1) / (cache.lengths // blocks.block_size + 1)
    # A slice of this layer would be a copy of its whole cache, which takes longer than reading it.
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (cache.keys, cache.values))
    lengths = cache.lengths + 1
    rows = layer * len(lengths) + jnp.arange(len(lengths))
    out = sparse_decode_attention(q_rotated[:, 0], keys, values, blocks, lengths=lengths, cache_rows=rows)
    assert isinstance(out, jax.Array)  # without return_lse
    return out[:, None], kept


def _select_decode(
    policy: Given | RankingPolicy,
    gate: DecodeGate | None,
    layer: Int[Array, ""],
    q: Float[Array, "B 1 H D"],
    q_rotated: Float[Array, "B 1 H D"],
    cache: Cache,
) -> BlockIndices:
    b = block_size_of(policy, gate)
    batch, capacity, kv_heads = cache.keys.shape[1:4]
    num_blocks = -(-capacity // b)
    column, current = jnp.arange(num_blocks)[None, None], (cache.lengths // b)[:, None, None]
    keep = jnp.broadcast_to((column == current) | (column == 0), (batch, kv_heads, num_blocks))
    if isinstance(policy, Given):
        mask = policy.mask[layer] & (column <= current)
        mask |= (column == current) & ~mask.any(-1, keepdims=True)
        return select_blocks(jnp.full(mask.shape, -jnp.inf), block_size=b, keep=mask)
    logits = _decode_logits(policy.scorer, gate, layer, q, q_rotated, cache, keep.shape, b)
    logits = jnp.where(column < current, logits, -jnp.inf)
    match policy:
        case Threshold():
            return select_blocks(logits, block_size=b, threshold=policy.threshold, keep=keep)
        case CumulativeMass():
            return select_blocks(logits, block_size=b, mass=policy.mass, keep=keep)
        case TokenBudget():
            most = policy.blocks(b)
            if most == 1:  # a budget of one block is for the current one
                keep &= column == current
            return select_blocks(logits, block_size=b, max_blocks=most, keep=keep)
        case TopK():
            width = min(max(2, int(policy.density * num_blocks)), num_blocks)
            wanted = jnp.floor(policy.density * (current + 1)).astype(jnp.int32)  # by the row's own length
            wanted = jnp.clip(wanted, min(2, width), width)
            return select_blocks(logits, block_size=b, max_blocks=wanted, keep=keep, width=width)


def _decode_logits(
    scorer: Scorer,
    gate: DecodeGate | None,
    layer: Int[Array, ""],
    q: Float[Array, "B 1 H D"],
    q_rotated: Float[Array, "B 1 H D"],
    cache: Cache,
    shape: tuple[int, ...],
    block_size: int,
) -> Float[Array, "B K Sb"]:
    position = cache.lengths
    match scorer:
        case Gate():
            if gate is None or cache.gate is None:
                raise ValueError(
                    "This policy ranks blocks by the decode gate, but the model has none; load or train one."
                )
            queries = gate.queries(q, position[:, None])
            return gate.logits(queries, cache.gate_keys(layer), (position // block_size)[:, None])[:, :, 0]
        case Oracle():
            return _decode_oracle(q_rotated[:, 0], cache.keys[layer], position, block_size)
        case SinkWindow():
            return jnp.broadcast_to(_recency(shape[-1]), shape)
        case Random():
            key = jax.random.fold_in(jax.random.key(scorer.seed), layer)

            def draw(position: Int[Array, ""]) -> Float[Array, "K Sb"]:  # of one row, whatever its neighbours do
                return jax.random.uniform(jax.random.fold_in(key, position), shape[1:])

            return jax.vmap(draw)(position)
    raise TypeError(f"Expected a scorer (Gate, Oracle, SinkWindow or Random); got {scorer!r}.")


def _decode_oracle(
    q: Float[Array, "B H D"], keys: Float[Array, "B S K D"], position: Int[Array, "B"], block_size: int
) -> Float[Array, "B K Sb"]:
    """Largest true attention probability within each block, over the group's query heads; a rank needs no row sum."""
    grouped = q.reshape(q.shape[0], keys.shape[2], -1, q.shape[-1]).astype(jnp.float32)
    logits = jnp.einsum("bkgd,bskd->bkgs", grouped, keys.astype(jnp.float32)) * q.shape[-1] ** -0.5
    visible = jnp.arange(keys.shape[1])[None, None, None] <= position[:, None, None, None]
    logits = jax.nn.log_softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    pad = -keys.shape[1] % block_size
    logits = jnp.pad(logits.max(2), ((0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:2], -1, block_size).max(-1)

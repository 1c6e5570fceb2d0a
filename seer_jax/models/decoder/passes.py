"""What each pass computes: whole prompts, prompts in chunks, one token of each row."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seer_jax.models.attention import attend_prompt, decode_attention, prefill_attention, share
from seer_jax.models.cache import Cache
from seer_jax.models.decoder.stack import LayerContext, LayerStack, Segment
from seer_jax.models.rope import rotate
from seer_jax.selection.context import DecodeContext


def read_layers(
    model: LayerStack, segments: Sequence[Segment], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T E"], Float[Array, "L B"]]:
    """See `Transformer.hidden_states`."""

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, lengths)
        out, kept = prefill_attention(layer.policy, context)
        return out, state, kept

    hidden, _, kept = model.scan(tokens, attend, segments=segments)
    return hidden, _of_all_heads(model, kept)


def read_logits(
    model: LayerStack, segments: Sequence[Segment], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T V"]]:
    """See `Transformer.__call__`."""
    hidden, _ = read_layers(model, segments, tokens, lengths)
    return (model.logits(hidden),)


def fill(
    model: LayerStack,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
    """See `Transformer.prefill`."""

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, lengths)
        out, kept = prefill_attention(layer.policy, context)
        cache = cache.fill(layer.index, context.k_rotated, context.v)
        if layer.decode_gate is not None:
            assert context.k is not None
            cache = cache.fill_decode_gate(layer.index, layer.decode_gate, context.k, lengths)
        return out, cache, kept

    hidden, cache, kept = model.scan(tokens, attend, cache, segments=segments)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _next_logits(model, last), cache.with_lengths(lengths), _of_all_heads(model, kept)


def fill_in_chunks(
    model: LayerStack,
    segments: Sequence[Segment],
    chunks: Int[Array, "B n T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    span: tuple[Int[Array, ""], Int[Array, ""]],
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
    """See `Transformer.extend`; `span` is the position of the first chunk, and how many chunks are read."""
    (start, count), lengths = span, span[0] + lengths
    gate, size = model.prefill_gate, chunks.shape[2]
    kept_keys = cache.prefill_gate_keys is not None
    if gate is not None and any(s.num_layers and s.policy.needs_gate for s in segments):
        cache = cache.with_prefill_gate_keys(gate.config, gate.num_key_heads)

    def read(i: Int[Array, ""], carry: tuple) -> tuple:
        cache, last, kept, visible = carry
        offset = start + i * size
        tokens = jax.lax.dynamic_index_in_dim(chunks, i, axis=1, keepdims=False)
        hidden, cache, (more_kept, more_visible) = _read_chunk(model, segments, tokens, lengths, cache, offset)
        place = (lengths - 1 - offset)[:, None, None]
        here = jnp.take_along_axis(hidden, jnp.clip(place, 0, size - 1), axis=1)[:, 0]
        last = jnp.where(((place >= 0) & (place < size))[:, 0], here, last)
        return cache, last, kept + more_kept, visible + more_visible

    batch, layers = len(lengths), model.config.num_layers
    blocks = jnp.zeros((layers, batch), jnp.float32)
    last = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    cache, last, kept, visible = jax.lax.fori_loop(0, count, read, (cache, last, blocks, blocks))
    cache = cache.with_lengths(lengths) if kept_keys else cache.with_lengths(lengths).without_prefill_gate_keys()
    return _next_logits(model, last), cache, _of_all_heads(model, share(kept, visible))


def fill_row(
    model: LayerStack,
    segments: Sequence[Segment],
    tokens: Int[Array, "1 T"],
    length: Int[Array, "1"],
    cache: Cache,
    place: tuple[Int[Array, ""], Int[Array, ""]],
) -> tuple[Float[Array, "1 V"], Cache]:
    """See `Transformer.prefill_row`; `place` is the row, and the position of the chunk."""
    row, offset = place
    hidden, cache, _ = _read_chunk(model, segments, tokens, length, cache, offset, row)
    last = jnp.clip(length - 1 - offset, 0, tokens.shape[1] - 1)
    return _next_logits(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache


def _read_chunk(
    model: LayerStack,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
    offset: Int[Array, ""],
    row: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T E"], Cache, tuple[Float[Array, "L B"], Float[Array, "L B"]]]:
    """Reads the tokens from position `offset` on into all rows of a cache, or one; blocks kept and visible as in `PromptAttention`."""

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context, cache = model.chunk_context(layer, cache, q, k, v, lengths, offset, row)
        attended = attend_prompt(layer.policy, context)
        return attended.out, cache, (attended.kept, attended.visible)

    return model.scan(tokens, attend, cache, segments=segments)


def append(
    model: LayerStack,
    segments: Sequence[Segment],
    tokens: Int[Array, "B"],
    cache: Cache,
    active: Bool[Array, "B"] | None,
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
    """See `Transformer.decode`."""
    shard = model.shard

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        # A list is chosen by all query heads of a group: devices that share the group's keys attend with all of them.
        q = q if shard is None else shard.group(q)
        q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], model.config.rope)
        cache = cache.append(layer.index, k_rotated[:, 0], v[:, 0], active)
        context = DecodeContext(
            q=q,
            q_rotated=q_rotated,
            cache=cache.view(layer.index),
            layer=layer.index,
            block_size=layer.policy.tokens_per_block(layer.decode_gate),
            gate=layer.decode_gate,
            shard=shard,
        )
        out, kept = decode_attention(layer.policy, context)
        return out if shard is None else shard.own_heads(out), cache, (kept, k[:, 0])

    hidden, cache, aux = model.scan(tokens[:, None], attend, cache, segments=segments, in_place=True)
    kept, keys = aux
    cache = cache.finish_step(model.decode_gate, keys, active)
    return _next_logits(model, hidden[:, 0]), cache, _of_all_heads(model, kept)


def _next_logits(model: LayerStack, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Logits of the whole vocabulary."""
    logits = model.logits(hidden)
    return logits if model.shard is None else model.shard.whole_vocabulary(logits)


def _of_all_heads(model: LayerStack, kept: Float[Array, "L B"]) -> Float[Array, "L B"]:
    """Shares of blocks that all heads kept, from those of the heads that a device has."""
    return kept if model.shard is None else model.shard.mean_over_tensor(kept)

"""One pass through the frozen model that yields loss and gradient of its gates, layer by layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import pool_blocks
from seer_jax.gates.decode import DecodeGate
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.rope import apply_rope
from seer_jax.train.data.batches import Batch
from seer_jax.train.distillation.prefill import (
    GateReport,
    Gradients,
    Layer,
    Sample,
    attend_and_distil,
    chunks_of,
    distil_prefill,
)
from seer_jax.train.loss import recall_stride, row_kl

# Tokens whose decode targets and logits exist at once. Fewer leave a large GPU idle between chunks.
QUERIES_AT_ONCE = 8192


class RowWeights(NamedTuple):
    """Weights of the rows in the loss; None for a gate that is not trained.

    Fields:
      prefill: of block rows.
      decode: of tokens.
    """

    prefill: Float32[Array, "B Tb"] | None
    decode: Float32[Array, "B T"] | None


class PassReport(NamedTuple):
    """See `GateReport`; None for a gate that is not trained."""

    prefill: GateReport | None
    decode: GateReport | None


def distillation_pass(
    model: Transformer,
    batch: Batch,
    weights: RowWeights,
    *,
    statistic: str = "max",
    decode_stride: int = 1,
    recall_density: float = 0.1,
) -> PassReport:
    """Loss and gradient of the gates on one batch.

    Each layer attends densely, and the same attention yields the targets of its gates; losses and gradients are computed right there,
    inside the scan over layers. Only hidden states pass on to the next layer, no gradients: the pass needs the memory of a single
    layer. Targets of a decode gate, one row per token, are made and used for `QUERIES_AT_ONCE` tokens at a time.

    Args:
      model: with the gates to train, or one device's part of it, whose loss, recall and gradient are those of its own heads and rows.
      batch: tokens and their sequences, each starting at a multiple of the gates' block size; where a decode gate is trained, T is such
        a multiple too.
      weights: of the rows; a gate without weights is not trained.
      statistic: what the targets are of: "max" or "mass", see `attention_with_block_scores`.
      decode_stride: only tokens 0, n, 2 n, ... of each row have weights for the decode gate; divides the block size.
      recall_density: see `block_recall`.

    Source: SeerAttention, arXiv 2410.13276, sec. 3.2; SeerAttention-R, arXiv 2506.08889, sec. 3.2.
    """
    block_size, shard = _block_size(model, weights), model.shard
    # A target of a decode gate is that of all query heads of a group: devices that share the group's keys attend with all of them.
    groups = shard if weights.decode is not None else None

    def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        own_q, q = q, q if groups is None else groups.group(q)
        k_rotated = apply_rope(k, batch.positions, model.config.rope)
        layer = Layer(q, k, v, k_rotated, batch, block_size, model.config.rope, statistic)
        prefill = decode = None
        if weights.decode is None:
            assert weights.prefill is not None
            arguments = layer, context.prefill_gate, weights.prefill, recall_density
            output, prefill = attend_and_distil(*arguments)
            return output, state, PassReport(prefill, None)
        arguments = layer, context.decode_gate, weights.decode, decode_stride, recall_density
        output, block_scores, decode = _distil_decode(*arguments, block_scores=weights.prefill is not None)
        if groups is not None:
            output = groups.own_heads(output)
            block_scores = None if block_scores is None else groups.own_heads(block_scores, axis=1)
            layer = layer._replace(q=own_q)
        if weights.prefill is not None:
            prefill = distil_prefill(layer, context.prefill_gate, block_scores, weights.prefill, recall_density)
        return output, state, PassReport(prefill, decode)

    return model.scan(batch.tokens, attend)[2]


def packed_decode_keys(
    gate: DecodeGate, k: Float[Array, "B S K D"], positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
) -> Float32[Array, "B Sw K C"]:
    """Compressed keys of one layer for packed sequences; k before RoPE."""
    size = gate.config.key_pool
    pooled = pool_blocks(k, gate.config.k_pooling, block_size=size, valid=segment_ids > 0)
    # The prefill gate projects the same pooled keys. XLA would merge both into one product, which it then fails to compile.
    return gate.compress(jax.lax.optimization_barrier(pooled), positions[:, ::size])


def packed_decode_logits(
    gate: DecodeGate,
    q: Float[Array, "B n H D"],
    keys: Float32[Array, "B Sw K C"],
    positions: Int[Array, "B n"],
    segment_ids: Int[Array, "B S"],
    start: int | Int[Array, ""] = 0,
    stride: int = 1,
) -> Float32[Array, "B K n Sb"]:
    """Logits of one layer for queries in packed sequences, -inf outside the completed earlier blocks of a token's own sequence.

    Args:
      q: before RoPE.
      keys: see `packed_decode_keys`.
      positions: of the queries in their sequences.
      segment_ids: of all tokens.
      start: place of the first query among them.
      stride: from one query's place to the next.
    """
    b, place = gate.config.block_size, start + stride * jnp.arange(q.shape[1])
    own, completed = segment_ids[:, place], jnp.broadcast_to(place // b, positions.shape)
    first = jnp.where(own > 0, (place[None] - positions) // b, completed)  # of its own sequence; padding sees nothing
    return gate.logits(gate.queries(q, positions), keys, completed=completed, first=first)


def _block_size(model: Transformer, weights: RowWeights) -> int:
    """b of the gates that have weights."""
    gates = [
        g for g, w in ((model.prefill_gate, weights.prefill), (model.decode_gate, weights.decode)) if w is not None
    ]
    sizes = [None if gate is None else gate.config.block_size for gate in gates]
    if not sizes or sizes[0] is None or sizes != sizes[:1] * len(sizes):
        raise ValueError(
            "A pass must have weights for at least one gate, and all gates with weights must be attached to the model and be of one "
            f"block size; got block sizes {sizes} (None: no such gate). Attach the gate, or leave its weights out."
        )
    if weights.decode is not None and weights.decode.shape[1] % sizes[0]:
        raise ValueError(
            f"Rows for a decode gate must be whole blocks of {sizes[0]} tokens; got {weights.decode.shape[1]} tokens. Pad them, with "
            "segment id 0."
        )
    return sizes[0]


def _distil_decode(
    layer: Layer, gate: Any, weights: Float32[Array, "B T"], every: int, recall_density: float, *, block_scores: bool
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B H Tb Tb"] | None, GateReport]:
    """Attention of one layer, the targets of its prefill gate if they are asked for, and loss and gradient of its decode gate.

    The queries come in chunks, each with its targets, its logits and the gradient with respect to the gate and to the compressed keys.
    The sum of the latter is propagated back to the gate once, at the end.
    """
    q, (_, segment_ids, positions) = layer.q, layer.batch
    (batch, tokens, heads, _), b = q.shape, layer.block_size
    start_of, size = chunks_of(tokens, QUERIES_AT_ONCE // batch, b)
    keys, pull_back = jax.vjp(lambda gate: packed_decode_keys(gate, layer.k, positions, segment_ids), gate)
    stride = recall_stride(tokens // every)

    def chunk(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, Sample]:
        output, blocks, total = carry
        start, fresh = start_of(i)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        q_chunk, position, weight = cut(q), cut(positions), jnp.where(fresh[None], cut(weights), 0)[:, ::every]
        attend = functools.partial(layer.attend, layer.rotated(q_chunk, position), query_offset=start)
        sample = functools.partial(Sample.of, first=start // every, stride=stride)

        def loss_of(gate: Any, keys: jax.Array, target: jax.Array) -> tuple[jax.Array, Sample]:
            places = position[:, ::every]
            logits = packed_decode_logits(gate, q_chunk[:, ::every], keys, places, segment_ids, start, every)
            return (row_kl(target, logits).mean(1) * weight).sum(), sample(target, logits, weight)

        def attend_and_train() -> tuple:
            scored = attend(block_scores=block_scores, token_scores=True)
            target = scored.token_scores[:, :, ::every]
            take = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
            (loss, seen), gradients = take(gate, keys, target)
            return scored.output, scored.block_scores, Gradients(loss, *gradients), seen

        def attend_alone() -> tuple:  # without the cost of targets: no query of the chunk is in the loss
            scored = attend(block_scores=block_scores)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(attend_and_train)[2:])
            return scored.output, scored.block_scores, *zeros

        in_loss = (weight != 0).any()
        out, new_blocks, added, seen = jax.lax.cond(in_loss, attend_and_train, attend_alone)
        output = jax.lax.dynamic_update_slice_in_dim(output, out, start, axis=1)
        if blocks is not None:
            blocks = jax.lax.dynamic_update_slice_in_dim(blocks, new_blocks, start // b, axis=2)
        return (output, blocks, jax.tree.map(jnp.add, total, added)), seen

    blocks = jnp.zeros((batch, heads, tokens // b, tokens // b)) if block_scores else None
    zeros = Gradients(jnp.float32(0), *jax.tree.map(jnp.zeros_like, (gate, keys)))
    carry, samples = jax.lax.scan(chunk, (jnp.zeros_like(q), blocks, zeros), jnp.arange(-(-tokens // size)))
    output, blocks, total = carry
    gradient = jax.tree.map(jnp.add, total.gradient, pull_back(total.key_gradient)[0])
    return output, blocks, GateReport(total.loss, *samples.recall(recall_density), gradient)

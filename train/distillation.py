"""One pass through the frozen model that yields loss and gradient of its gates, layer by layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import attention_with_block_scores, pool_blocks
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import RopeConfig
from seer_jax.models.decoder import LayerContext, Transformer
from seer_jax.models.rope import apply_rope
from seer_jax.train.data.batches import Batch
from seer_jax.train.loss import block_recall, recall_of_rows, recall_stride, row_kl

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


class GateReport(NamedTuple):
    """Result of one pass for one kind of gate, per layer.

    Fields:
      loss: weighted sum over rows of the mean over heads of the KL divergence, nats.
      recall, recall_weight: sums whose quotient is the block recall.
      gradient: of the loss with respect to the gate, in the structure of the gate.
    """

    loss: Float32[Array, "L"]
    recall: Float32[Array, "L"]
    recall_weight: Float32[Array, "L"]
    gradient: Any


class PassReport(NamedTuple):
    """See `GateReport`; None for a gate that is not trained."""

    prefill: GateReport | None
    decode: GateReport | None


def distillation_pass(
    model: Transformer, batch: Batch, weights: RowWeights, *, statistic: str = "max", recall_density: float = 0.1
) -> PassReport:
    """Loss and gradient of the gates on one batch.

    Each layer attends densely, and the same attention yields the targets of its gates; losses and gradients are computed right there,
    inside the scan over layers. Only hidden states pass on to the next layer, no gradients: the pass needs the memory of a single
    layer. Targets of a decode gate, one row per token, are made and used for `QUERIES_AT_ONCE` tokens at a time.

    Args:
      model: with the gates to train.
      batch: tokens and their sequences, each starting at a multiple of the gates' block size; where a decode gate is trained, T is such
        a multiple too.
      weights: of the rows; a gate without weights is not trained.
      statistic: what the targets are of: "max" or "mass", see `attention_with_block_scores`.
      recall_density: see `block_recall`.

    Source: SeerAttention, arXiv 2410.13276, sec. 3.2; SeerAttention-R, arXiv 2506.08889, sec. 3.2.
    """
    block_size = _block_size(model, weights)

    def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        k_rotated = apply_rope(k, batch.positions, model.config.rope)
        layer = _Layer(q, k, v, k_rotated, batch, block_size, model.config.rope, statistic)
        prefill = decode = None
        if weights.decode is None:
            scored = layer.attend(layer.rotated(q, batch.positions), block_scores=True)
            output, block_scores = scored.output, scored.block_scores
        else:
            arguments = layer, context.decode_gate, weights.decode, recall_density
            output, block_scores, decode = _distil_decode(*arguments, block_scores=weights.prefill is not None)
        if weights.prefill is not None:
            prefill = _distil_prefill(layer, context.prefill_gate, block_scores, weights.prefill, recall_density)
        return output, state, PassReport(prefill, decode)

    return model.scan(batch.tokens, attend)[2]


def packed_prefill_logits(
    gate: PrefillGate,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float32[Array, "B H Tb Tb"]:
    """Logits of one layer for packed sequences, -inf outside a block row's own sequence; q and k before RoPE."""
    valid, places = segment_ids > 0, jnp.arange(q.shape[1])[None]
    seen = gate.seen(places, valid, places - positions)
    logits = gate.logits(gate.queries(q, positions, valid), gate.keys(k, positions, valid), seen=seen)
    segment = segment_ids[:, :: gate.config.block_size]
    same = (segment[:, :, None] == segment[:, None]) & (segment > 0)[:, :, None]
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    return jnp.where((same & causal[None])[:, None], logits, -jnp.inf)


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
) -> Float32[Array, "B K n Sb"]:
    """Logits of one layer for queries in packed sequences, -inf outside the completed earlier blocks of a token's own sequence.

    Args:
      q: before RoPE.
      keys: see `packed_decode_keys`.
      positions: of the queries in their sequences.
      segment_ids: of all tokens.
      start: place of the first query among them.
    """
    b, place = gate.config.block_size, start + jnp.arange(q.shape[1])
    own, completed = segment_ids[:, place], jnp.broadcast_to(place // b, positions.shape)
    first = jnp.where(own > 0, (place[None] - positions) // b, completed)  # of its own sequence; padding sees nothing
    return gate.logits(gate.queries(q, positions), keys, completed=completed, first=first)


class _Layer(NamedTuple):
    """Queries, keys and values of one layer before RoPE, rotated keys, the batch that they belong to, and what its targets are of."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    k_rotated: Float[Array, "B T K D"]
    batch: Batch
    block_size: int
    rope: RopeConfig
    statistic: str

    def rotated(self, q: Float[Array, "B n H D"], positions: Int[Array, "B n"]) -> Float[Array, "B n H D"]:
        return apply_rope(q, positions, self.rope)

    def attend(self, q_rotated: Float[Array, "B n H D"], **settings: Any) -> Any:
        """Attention of some queries to all keys; settings are those of `attention_with_block_scores`."""
        own = dict(block_size=self.block_size, segment_ids=self.batch.segment_ids, statistic=self.statistic)
        return attention_with_block_scores(q_rotated, self.k_rotated, self.v, **own, **settings)


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


def _distil_prefill(
    layer: _Layer,
    gate: Any,
    target: Float32[Array, "B H Tb Tb"] | None,
    weights: Float32[Array, "B Tb"],
    recall_density: float,
) -> GateReport:
    """Loss, recall and gradient of the prefill gate in one layer."""
    assert target is not None

    def loss_of(gate: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = packed_prefill_logits(gate, layer.q, layer.k, layer.batch.positions, layer.batch.segment_ids)
        loss = (row_kl(target, logits).mean(1) * weights).sum()
        return loss, block_recall(target, logits, weights, recall_density)

    (loss, (recall, recall_weight)), gradient = jax.value_and_grad(loss_of, has_aux=True)(gate)
    return GateReport(loss, recall, recall_weight, gradient)


class _Gradients(NamedTuple):
    """What queries add to loss and gradient of the decode gate.

    Fields:
      loss: their part of the loss.
      gradient: with respect to the gate, the compressed keys held constant.
      key_gradient: with respect to the compressed keys.
    """

    loss: Float32[Array, ""]
    gradient: Any
    key_gradient: Float32[Array, "B Sw K C"]


class _Sample(NamedTuple):
    """The rows of a chunk that block recall looks at."""

    target: Float32[Array, "B K m Sb"]
    logits: Float32[Array, "B K m Sb"]
    weights: Float32[Array, "B m"]


def _distil_decode(
    layer: _Layer, gate: Any, weights: Float32[Array, "B T"], recall_density: float, *, block_scores: bool
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B H Tb Tb"] | None, GateReport]:
    """Attention of one layer, the targets of its prefill gate if they are asked for, and loss and gradient of its decode gate.

    The queries come in chunks, each with its targets, its logits and the gradient with respect to the gate and to the compressed keys.
    The sum of the latter is propagated back to the gate once, at the end.
    """
    q, (_, segment_ids, positions) = layer.q, layer.batch
    (batch, tokens, heads, _), b = q.shape, layer.block_size
    start_of, size = _chunks(tokens, batch, b)
    keys, pull_back = jax.vjp(lambda gate: packed_decode_keys(gate, layer.k, positions, segment_ids), gate)
    stride = recall_stride(tokens)

    def chunk(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, _Sample]:
        output, blocks, total = carry
        start, fresh = start_of(i)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        q_chunk, position, weight = cut(q), cut(positions), jnp.where(fresh[None], cut(weights), 0)
        attend = functools.partial(layer.attend, layer.rotated(q_chunk, position), query_offset=start)
        sampled = jnp.arange(-(-size // stride)) * stride + (-start) % stride
        row_numbers, within = jnp.minimum(sampled, size - 1), sampled < size

        def loss_of(gate: Any, keys: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = packed_decode_logits(gate, q_chunk, keys, position, segment_ids, start)
            return (row_kl(target, logits).mean(1) * weight).sum(), logits[:, :, row_numbers]

        def attend_and_train() -> tuple:
            scored = attend(block_scores=block_scores, token_scores=True)
            target = scored.token_scores
            take = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
            (loss, logits), gradients = take(gate, keys, target)
            return scored.output, scored.block_scores, _Gradients(loss, *gradients), target[:, :, row_numbers], logits

        def attend_alone() -> tuple:  # without the cost of targets: no query of the chunk is in the loss
            scored = attend(block_scores=block_scores)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(attend_and_train)[2:])
            return scored.output, scored.block_scores, *zeros

        in_loss = (weight != 0).any()
        out, new_blocks, added, target, logits = jax.lax.cond(in_loss, attend_and_train, attend_alone)
        output = jax.lax.dynamic_update_slice_in_dim(output, out, start, axis=1)
        if blocks is not None:
            blocks = jax.lax.dynamic_update_slice_in_dim(blocks, new_blocks, start // b, axis=2)
        sample = _Sample(target, logits, jnp.where(within[None], weight[:, row_numbers], 0))
        return (output, blocks, jax.tree.map(jnp.add, total, added)), sample

    blocks = jnp.zeros((batch, heads, tokens // b, tokens // b)) if block_scores else None
    zeros = _Gradients(jnp.float32(0), *jax.tree.map(jnp.zeros_like, (gate, keys)))
    carry, samples = jax.lax.scan(chunk, (jnp.zeros_like(q), blocks, zeros), jnp.arange(-(-tokens // size)))
    output, blocks, total = carry
    gradient = jax.tree.map(jnp.add, total.gradient, pull_back(total.key_gradient)[0])
    # [chunks, B, K, m, Sb] to [B, K, rows, Sb], and [chunks, B, m] to [B, rows].
    target, logits = (
        jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1]) for x in (samples.target, samples.logits)
    )
    row_weights = jnp.moveaxis(samples.weights, 0, 1).reshape(batch, -1)
    recall, recall_weight = recall_of_rows(target, logits, row_weights, recall_density)
    return output, blocks, GateReport(total.loss, recall, recall_weight, gradient)


def _chunks(tokens: int, batch: int, block_size: int) -> tuple[Any, int]:
    """Equal chunks of tokens: (i -> (first token of chunk i, which of its tokens no earlier chunk has), tokens in each).

    The last chunk overlaps the one before where the chunks would otherwise end beyond the last token.
    """
    blocks, most = tokens // block_size, max(QUERIES_AT_ONCE // batch // block_size, 1)
    size = -(-blocks // -(-blocks // most)) * block_size

    def start_of(i: Int[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, "n"]]:
        start = jnp.minimum(i * size, tokens - size)
        return start, start + jnp.arange(size) >= i * size

    return start_of, size

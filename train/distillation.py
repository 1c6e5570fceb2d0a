"""One pass through the frozen model that teaches its gates, layer by layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import attention_with_block_scores, pool_blocks
from seer_jax.attention import rotate
from seer_jax.gate import DecodeGate, PrefillGate
from seer_jax.model import LayerContext, Transformer
from seer_jax.train.data import Batch
from seer_jax.train.loss import block_recall, row_kl


class RowWeights(NamedTuple):
    """What each row counts in the loss; None for a gate that is not trained.

    Fields:
      prefill: of block rows.
      decode: of tokens.
    """

    prefill: Float32[Array, "B Tb"] | None
    decode: Float32[Array, "B T"] | None


class GateReport(NamedTuple):
    """What one kind of gate did in one pass, per layer.

    Fields:
      loss: weighted sum over rows of the mean over heads of the KL divergence, nats.
      recall, recall_weight: sums whose quotient is the block recall.
      gradient: of the loss, shaped as the gate.
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
    model: Transformer, batch: Batch, weights: RowWeights, *, recall_density: float = 0.1
) -> PassReport:
    """Loss and gradient of the gates on one batch.

    Each layer attends densely, and the same attention yields the targets of its gates; its losses and their gradients
    are taken right there, inside the scan over layers. Nothing but the hidden states goes on to the next layer, and no
    gradient does: the pass needs the memory of a single layer.

    Args:
      model: with the gates to train.
      batch: tokens and their sequences, each starting at a multiple of the gates' block size.
      weights: of the rows; a gate without weights is left alone.
      recall_density: see `block_recall`.

    Source: SeerAttention, arXiv 2410.13276, sec. 3.2; SeerAttention-R, arXiv 2506.08889, sec. 3.2.
    """
    block_size = _block_size(model, weights)
    segment_ids, positions = batch.segment_ids, batch.positions

    def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        q_rotated, k_rotated = rotate(q, k, positions, model.config)
        scored = attention_with_block_scores(
            q_rotated,
            k_rotated,
            v,
            block_size=block_size,
            block_scores=weights.prefill is not None,
            token_scores=weights.decode is not None,
            segment_ids=segment_ids,
        )
        inputs, prefill, decode = (q, k, positions, segment_ids), None, None
        if weights.prefill is not None:
            lesson = (scored.block_scores, weights.prefill, recall_density)
            prefill = _teach(context.prefill_gate, packed_prefill_logits, inputs, *lesson)
        if weights.decode is not None:
            lesson = (scored.token_scores, weights.decode, recall_density)
            decode = _teach(context.decode_gate, packed_decode_logits, inputs, *lesson)
        return scored.output, state, PassReport(prefill, decode)

    return model.scan(batch.tokens, attend)[2]


def packed_prefill_logits(
    gate: PrefillGate,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float32[Array, "B H Tb Tb"]:
    """Logits of one layer for packed sequences, -inf outside a block row's own sequence; q and k before RoPE."""
    logits = gate(q, k, positions, segment_ids > 0)
    segment = segment_ids[:, :: gate.config.block_size]
    same = (segment[:, :, None] == segment[:, None]) & (segment > 0)[:, :, None]
    return jnp.where(same[:, None], logits, -jnp.inf)


def packed_decode_logits(
    gate: DecodeGate,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float32[Array, "B K T Sb"]:
    """Logits of one layer for packed sequences, -inf outside the completed earlier blocks of a token's own one; q and k
    before RoPE."""
    b = gate.config.block_size
    pooled = pool_blocks(k, gate.config.k_pooling, block_size=b, valid=segment_ids > 0)
    completed = jnp.broadcast_to(jnp.arange(q.shape[1]) // b, positions.shape)  # in the row; other sequences go below
    logits = gate.logits(gate.queries(q, positions), gate.keys(pooled, positions[:, ::b]), completed)
    same = (segment_ids[:, :, None] == segment_ids[:, None, ::b]) & (segment_ids > 0)[:, :, None]
    return jnp.where(same[:, None], logits, -jnp.inf)


def _block_size(model: Transformer, weights: RowWeights) -> int:
    """b of the gates that have weights."""
    gates = [
        g for g, w in ((model.prefill_gate, weights.prefill), (model.decode_gate, weights.decode)) if w is not None
    ]
    sizes = [None if gate is None else gate.config.block_size for gate in gates]
    if not sizes or sizes[0] is None or sizes != sizes[:1] * len(sizes):
        raise ValueError(
            "A pass teaches the gates that have weights: one at least, all attached to the model, of one block size; "
            f"got block sizes {sizes} (None: no such gate)."
        )
    return sizes[0]


def _teach(
    gate: Any,
    logits_of: Callable[..., jax.Array],
    inputs: tuple,
    target: Float32[Array, "B heads R Sb"] | None,
    weights: Float32[Array, "B R"],
    recall_density: float,
) -> GateReport:
    """Loss, recall and gradient of one gate in one layer."""
    assert target is not None

    def loss_of(gate: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits_of(gate, *inputs)
        loss = (row_kl(target, logits).mean(1) * weights).sum()
        return loss, block_recall(target, logits, weights, recall_density)

    (loss, (recall, recall_weight)), gradient = jax.value_and_grad(loss_of, has_aux=True)(gate)
    return GateReport(loss, recall, recall_weight, gradient)

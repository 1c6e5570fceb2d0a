"""Loss and gradient of a prefill gate in one layer; of long rows for a part of the block rows at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import attention_with_block_scores
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import RopeConfig
from seer_jax.models.rope import apply_rope
from seer_jax.selection.context import PrefillContext
from seer_jax.train.data.batches import Batch
from seer_jax.train.loss import block_recall, recall_of_rows, recall_stride, row_kl

# Targets and logits of a head that exist at once: the whole map of 64k tokens, a part of that of longer rows. So these buffers, and their
# gradients, do not grow with the square of the length.
SCORES_AT_ONCE = 2**20


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


class Layer(NamedTuple):
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


def layer_of(context: PrefillContext, batch: Batch, block_size: int, rope: RopeConfig, statistic: str) -> Layer:
    """A layer by its context, which must be that of whole prompts."""
    assert context.k is not None
    return Layer(context.q, context.k, context.v, context.k_rotated, batch, block_size, rope, statistic)


def packed_prefill_logits(
    gate: PrefillGate,
    q: Float[Array, "B n H D"],
    k: Float[Array, "B T K D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float32[Array, "B H Tb Tb"]:
    """Logits of one layer for packed sequences, -inf outside a block row's own sequence; q and k before RoPE."""
    return _row_logits(gate, q, gate.keys(k, positions, segment_ids > 0), positions, segment_ids, 0)


def _row_logits(
    gate: PrefillGate,
    q: Float[Array, "B n H D"],
    keys: Float32[Array, "B Sw heads C"],
    positions: Int[Array, "B n"],
    segment_ids: Int[Array, "B T"],
    start: int | Int[Array, ""],
) -> Float32[Array, "B H nb Tb"]:
    """The rows of `packed_prefill_logits` whose first query has the place `start` among all tokens, a multiple of the block size."""
    b, places = gate.config.block_size, start + jnp.arange(q.shape[1])[None]
    own = jax.lax.dynamic_slice_in_dim(segment_ids, start, q.shape[1], axis=1)
    valid = own > 0
    seen = gate.seen(places, valid, places - positions)
    logits = gate.logits(gate.queries(q, positions, valid), keys, row_offset=start // b, seen=seen)
    rows, columns = own[:, ::b], segment_ids[:, ::b]
    same = (rows[:, :, None] == columns[:, None]) & (rows > 0)[:, :, None]
    causal = jnp.arange(columns.shape[1])[None] <= start // b + jnp.arange(rows.shape[1])[:, None]
    return jnp.where((same & causal[None])[:, None], logits, -jnp.inf)


def attend_and_distil(
    layer: Layer, gate: Any, weights: Float32[Array, "B Tb"], recall_density: float
) -> tuple[Float[Array, "B T H D"], GateReport]:
    """Attention of one layer, and `distil_prefill` with its targets."""
    if _is_long(layer):
        return _distil_in_chunks(layer, gate, None, weights, recall_density)
    scored = layer.attend(layer.rotated(layer.q, layer.batch.positions), block_scores=True)
    return scored.output, distil_prefill(layer, gate, scored.block_scores, weights, recall_density)


def distil_prefill(
    layer: Layer,
    gate: Any,
    target: Float32[Array, "B H Tb Tb"] | None,
    weights: Float32[Array, "B Tb"],
    recall_density: float,
) -> GateReport:
    """Loss, recall and gradient of the prefill gate in one layer."""
    assert target is not None
    if _is_long(layer):
        return _distil_in_chunks(layer, gate, target, weights, recall_density)[1]

    def loss_of(gate: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = packed_prefill_logits(gate, layer.q, layer.k, layer.batch.positions, layer.batch.segment_ids)
        loss = (row_kl(target, logits).mean(1) * weights).sum()
        return loss, block_recall(target, logits, weights, recall_density)

    (loss, (recall, recall_weight)), gradient = jax.value_and_grad(loss_of, has_aux=True)(gate)
    return GateReport(loss, recall, recall_weight, gradient)


def _is_long(layer: Layer) -> bool:
    """Whether block rows come in chunks: rows of whole blocks, as training packs them, that have more scores than exist at once."""
    tokens, b = layer.q.shape[1], layer.block_size
    return tokens % b == 0 and (tokens // b) ** 2 > SCORES_AT_ONCE


def _distil_in_chunks(
    layer: Layer, gate: Any, target: Float32[Array, "B H Tb Tb"] | None, weights: Float32[Array, "B Tb"], density: float
) -> tuple[Float[Array, "B T H D"], GateReport]:
    """As `distil_prefill`, for a chunk of block rows at a time; without targets, attention makes them, and its output comes too.

    Sums over chunks are rounded in another order than those of all rows at once.
    """
    q, (_, segment_ids, positions) = layer.q, layer.batch
    tokens, b = q.shape[1], layer.block_size
    start_of, size = chunks_of(tokens, SCORES_AT_ONCE // (tokens // b) * b, b)
    keys, pull_back = jax.vjp(lambda gate: gate.keys(layer.k, positions, segment_ids > 0), gate)
    stride = recall_stride(tokens // b)

    def chunk(carry: tuple, i: Int[Array, ""]) -> tuple[tuple, Sample]:
        output, total = carry
        start, fresh = start_of(i)
        q_chunk, position = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (q, positions))
        weight = jax.lax.dynamic_slice_in_dim(weights, start // b, size // b, axis=1)
        weight = jnp.where(fresh[None, ::b], weight, 0)
        if target is None:
            scored = layer.attend(layer.rotated(q_chunk, position), query_offset=start, block_scores=True)
            output, truth = (
                jax.lax.dynamic_update_slice_in_dim(output, scored.output, start, axis=1),
                scored.block_scores,
            )
        else:
            truth = jax.lax.dynamic_slice_in_dim(target, start // b, size // b, axis=2)

        def loss_of(gate: Any, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = _row_logits(gate, q_chunk, keys, position, segment_ids, start)
            return (row_kl(truth, logits).mean(1) * weight).sum(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(gate, keys)
        sample = Sample.of(truth, logits, weight, first=start // b, stride=stride)
        return (output, jax.tree.map(jnp.add, total, Gradients(loss, *gradients))), sample

    zeros = Gradients(jnp.float32(0), *jax.tree.map(jnp.zeros_like, (gate, keys)))
    (output, total), samples = jax.lax.scan(chunk, (jnp.zeros_like(q), zeros), jnp.arange(-(-tokens // size)))
    gradient = jax.tree.map(jnp.add, total.gradient, pull_back(total.key_gradient)[0])
    return output, GateReport(total.loss, *samples.recall(density), gradient)


class Gradients(NamedTuple):
    """What queries add to loss and gradient of a gate.

    Fields:
      loss: their part of the loss.
      gradient: with respect to the gate, the compressed keys held constant.
      key_gradient: with respect to the compressed keys.
    """

    loss: Float32[Array, ""]
    gradient: Any
    key_gradient: Float32[Array, "B Sw heads C"]


class Sample(NamedTuple):
    """The rows of a chunk that block recall looks at; with a leading axis, those of all chunks."""

    target: Float32[Array, "*chunks B heads m Sb"]
    logits: Float32[Array, "*chunks B heads m Sb"]
    weights: Float32[Array, "*chunks B m"]

    @classmethod
    def of(
        cls,
        target: Float32[Array, "B heads R Sb"],
        logits: Float32[Array, "B heads R Sb"],
        weights: Float32[Array, "B R"],
        *,
        first: Int[Array, ""],
        stride: int,
    ) -> "Sample":
        """Every `stride`-th row of all, of those from row `first` on that a chunk has."""
        rows = weights.shape[1]
        sampled = jnp.arange(-(-rows // stride)) * stride + (-first) % stride
        numbers, within = jnp.minimum(sampled, rows - 1), sampled < rows
        return cls(target[:, :, numbers], logits[:, :, numbers], jnp.where(within[None], weights[:, numbers], 0))

    def recall(self, density: float) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        """`block_recall` of the rows of all chunks."""
        # [chunks, B, heads, m, Sb] to [B, heads, rows, Sb], and [chunks, B, m] to [B, rows].
        target, logits = (
            jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1]) for x in (self.target, self.logits)
        )
        weights = jnp.moveaxis(self.weights, 0, 1).reshape(self.weights.shape[1], -1)
        return recall_of_rows(target, logits, weights, density)


def chunks_of(tokens: int, most: int, block_size: int) -> tuple[Any, int]:
    """Equal chunks of whole blocks, at most `most` tokens or a block each: (i -> (first token of chunk i, which of its tokens no earlier chunk
    has), tokens in each).

    The last chunk overlaps the one before where the chunks would otherwise end beyond the last token.
    """
    blocks, most = tokens // block_size, max(most // block_size, 1)
    size = -(-blocks // -(-blocks // most)) * block_size

    def start_of(i: Int[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, "n"]]:
        start = jnp.minimum(i * size, tokens - size)
        return start, start + jnp.arange(size) >= i * size

    return start_of, size

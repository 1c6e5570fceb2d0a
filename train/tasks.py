"""What can be trained: gates by distillation, or all weights or adapters by the language-model loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from seer_jax.lora import adapted
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.dense_attention import dense_attention
from seer_jax.models.layers import BaseParam, LoraParam
from seer_jax.models.rope import rotate
from seer_jax.sharding.shard import Shard
from seer_jax.train.config import DistillConfig, TargetStatistic
from seer_jax.train.data.batches import Batch
from seer_jax.train.distillation import RowWeights, distillation_pass
from seer_jax.train.loss import decode_rows, lm_loss, lm_targets, prefill_rows, row_weights
from seer_jax.train.step import FrozenWeights, ModelParts, Sums, Weights


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Trains gates to predict which blocks dense attention looks at; the base model does not change."""

    parts: ModelParts
    config: DistillConfig
    block_size: int

    @classmethod
    def start(cls, model: Transformer, config: DistillConfig) -> tuple["Distillation", Weights, FrozenWeights]:
        """The task, float32 weights of the gates (copies), and the rest of the model."""
        names = config.kind.attributes
        parts, trained, frozen = ModelParts.split(model, lambda path, _: path[0] in names)
        block_size = getattr(model, names[0]).config.block_size
        return cls(parts, config, block_size), master_copy(trained), frozen

    def weigh(self, batch: Batch, shard: Shard | None = None) -> RowWeights:
        """The same weight for every row in the loss."""
        ids, positions = batch.segment_ids, batch.positions
        names, config = self.config.kind.attributes, self.config
        prefill = decode = None
        if "prefill_gate" in names:
            rows = prefill_rows(ids, positions, block_size=self.block_size, skip=config.prefill_skip)
            prefill = row_weights(rows, shard)
        if "decode_gate" in names:
            rows = decode_rows(ids, positions, block_size=self.block_size, skip=config.decode_skip)
            rows &= jnp.arange(ids.shape[1])[None] % config.decode_stride == 0
            decode = row_weights(rows, shard)
        return RowWeights(prefill, decode)

    def gradients(
        self,
        trained: Weights,
        frozen: FrozenWeights,
        batch: Batch,
        weights: RowWeights,
        shard: Shard | None = None,
    ) -> tuple[Weights, Sums]:
        """See `distillation_pass`."""
        model = self.parts.merge(trained, frozen, shard)
        report = distillation_pass(
            model,
            batch,
            weights,
            statistic=(self.config.target or TargetStatistic.MAX).value,
            decode_stride=self.config.decode_stride,
            recall_density=self.config.recall_density,
        )
        gradients, sums = {}, {}
        for kind, gate in (("prefill", report.prefill), ("decode", report.decode)):
            if gate is not None:
                gradients[f"{kind}_gate"] = nnx.to_pure_dict(nnx.state(gate.gradient))
                sums[f"{kind}_loss"] = gate.loss.sum()
                sums[f"{kind}_recall"] = gate.recall.sum()
                sums[f"{kind}_recall_weight"] = gate.recall_weight.sum()
        return gradients, sums

    def metrics(self, sums: Sums) -> dict[str, Float32[Array, ""]]:
        """Losses summed over layers, and block recall as the mean over layers, heads and rows."""
        kinds = [name.removesuffix("_gate") for name in self.config.kind.attributes]
        metrics = {"loss": sum((sums[f"{kind}_loss"] for kind in kinds), start=jnp.float32(0))}
        for kind in kinds:
            metrics[f"{kind}_loss"] = sums[f"{kind}_loss"]
            seen = sums[f"{kind}_recall_weight"]
            metrics[f"{kind}_recall"] = sums[f"{kind}_recall"] / jnp.where(seen > 0, seen, 1)
        return metrics


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Trains all base weights, or the adapter of a model that has one, to predict the next token, with dense attention within each
    sequence."""

    parts: ModelParts
    packed: bool

    @classmethod
    def start(cls, model: Transformer, *, packed: bool) -> tuple["LanguageModelling", Weights, FrozenWeights]:
        """The task, float32 master copies of the weights that train, and the rest of the model.

        Args:
          model: computes in its own dtype.
          packed: whether a row may hold several sequences or padding.
        """
        kind = LoraParam if adapted(model) else BaseParam
        parts, trained, frozen = ModelParts.split(model, lambda _, variable: isinstance(variable, kind))
        return cls(parts, packed), master_copy(trained), frozen

    def weigh(self, batch: Batch, shard: Shard | None = None) -> Float32[Array, "B T"]:
        """The same weight for every token whose successor belongs to its sequence."""
        return row_weights(lm_targets(batch.tokens, batch.segment_ids)[1], shard)

    def gradients(
        self,
        trained: Weights,
        frozen: FrozenWeights,
        batch: Batch,
        weights: Float32[Array, "B T"],
        shard: Shard | None = None,
    ) -> tuple[Weights, Sums]:
        """Gradients of the mean cross-entropy.

        Of one device's part: the devices that share rows all have the loss of these rows, and differentiate the sum of what all of
        them report.
        """
        tokens, segment_ids = batch.tokens, batch.segment_ids

        def loss_of(trained: Weights) -> jax.Array:
            model = self.parts.merge(trained, frozen, shard)
            hidden = dense_hidden(model, tokens, batch.positions, segment_ids if self.packed else None)
            head, hidden = model.whole_head(hidden)
            return lm_loss(hidden, head, lm_targets(tokens, segment_ids)[0], weights, shard)

        loss, gradients = jax.value_and_grad(loss_of)(trained)
        return gradients, {"loss": loss}

    def metrics(self, sums: Sums) -> dict[str, Float32[Array, ""]]:
        """Mean cross-entropy, nats per token."""
        return {"loss": sums["loss"]}


def dense_hidden(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """Hidden states after the final norm, with dense attention; layers are computed anew in a backward pass.

    Args:
      segment_ids: of the sequences that a row holds; None: each row is one.
    """

    def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        q, k = rotate(q, k, positions, model.config.rope)
        return dense_attention(q, k, v, segment_ids=segment_ids), state, None

    return model.scan(tokens, attend, remat=True)[0]


def master_copy(weights: Weights) -> Weights:
    """Float32 copies; of shapes, shapes.

    Copies, because each step donates its weights and the caller's model must stay intact. Float32, because at a learning rate of 1e-5
    the update of a bfloat16 weight rounds to zero.
    """

    def copy(w: Any) -> Any:
        if isinstance(w, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(w.shape, jnp.float32)
        return jnp.array(w, jnp.float32, copy=True)

    return jax.tree.map(copy, weights)

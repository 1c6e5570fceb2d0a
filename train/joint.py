"""Fine-tuning of a model together with its prefill gate, whose lists its attention is sparse on; also as self-distillation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from pallas_kernels import block_sparse_attention
from seer_jax.lora import adapted
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.layers import BaseParam, LoraParam
from seer_jax.selection.rules import TopK
from seer_jax.sharding.shard import Shard
from seer_jax.train.config import FinetuneConfig, TargetStatistic
from seer_jax.train.data.batches import Batch
from seer_jax.train.distillation.prefill import distil_prefill, layer_of
from seer_jax.train.loss import distillation_loss, lm_loss, lm_targets, prefill_rows, row_weights
from seer_jax.train.step import FrozenWeights, ModelParts, Sums, Weights
from seer_jax.train.tasks import dense_hidden, master_copy

GATE = "prefill_gate"


class TokensAndRows(NamedTuple):
    """Weights in the language-model loss and in the gate's."""

    tokens: Float32[Array, "B T"]
    rows: Float32[Array, "B Tb"]


@dataclasses.dataclass(frozen=True)
class JointTraining:
    """Trains base weights or an adapter, and the prefill gate, in one pass over rows of one sequence each.

    In each layer a dense pass without gradients gives the gate its targets, and block-sparse attention on the gate's own top-k lists gives
    the output. The gate's loss and gradient are computed right there, from queries and keys that are held constant; the lists are
    constants of the language-model loss. The backward pass computes layers again, without the dense pass.

    As self-distillation (`distils`) an adapter trains, and the loss of the model is KL(p || q): p are the next-token distributions of the
    model with dense attention and without the adapter, of a pass without gradients, q those of the model that trains.

    Attributes:
      density: share of the causal block map that attention keeps.
      weight: of the gate's loss, beside that of the model.
      distils: whether the model's own distributions under dense attention are the targets, in place of the next tokens.
      statistic: what the gate's targets are of, see `distillation_pass`.
      recall_density: see `loss.block_recall`.

    Source: SeerAttention, arXiv 2410.13276, long-context fine-tuning with YaRN.
    """

    parts: ModelParts
    block_size: int
    density: float
    weight: float
    distils: bool = False
    statistic: str = "max"
    recall_density: float = 0.1

    @classmethod
    def of(cls, config: FinetuneConfig, model: Transformer) -> tuple["JointTraining", Weights, FrozenWeights]:
        """As `start`, by the settings of a run."""
        statistic = (config.target or TargetStatistic.MAX).value
        return cls.start(
            model, density=config.density, weight=config.gate_loss_weight, distils=config.distil, statistic=statistic
        )

    @classmethod
    def start(
        cls, model: Transformer, *, density: float, weight: float, distils: bool = False, statistic: str = "max"
    ) -> tuple["JointTraining", Weights, FrozenWeights]:
        """The task, float32 master copies of the weights that train, and the rest of the model, which carries a prefill gate."""
        assert model.prefill_gate is not None
        kind = LoraParam if adapted(model) else BaseParam
        parts, trained, frozen = ModelParts.split(
            model, lambda path, variable: path[0] == GATE or isinstance(variable, kind)
        )
        task = cls(parts, model.prefill_gate.config.block_size, density, weight, distils, statistic)
        return task, master_copy(trained), frozen

    def weigh(self, batch: Batch, shard: Shard | None = None) -> TokensAndRows:
        """The same weight for every token whose successor belongs to its sequence, and for every block row."""
        rows = prefill_rows(batch.segment_ids, batch.positions, block_size=self.block_size, skip=0.0)
        tokens = row_weights(lm_targets(batch.tokens, batch.segment_ids)[1], shard)
        return TokensAndRows(tokens, row_weights(rows, shard))

    def gradients(
        self,
        trained: Weights,
        frozen: FrozenWeights,
        batch: Batch,
        weights: TokensAndRows,
        shard: Shard | None = None,
    ) -> tuple[Weights, Sums]:
        """Gradients of the model's loss, and of the gate's; see `tasks.LanguageModelling.gradients`."""
        gate, base = trained[GATE], {name: weight for name, weight in trained.items() if name != GATE}
        policy = TopK(self.density)
        teacher = self._teacher(trained, frozen, batch, shard) if self.distils else None
        if teacher is not None and shard is not None:  # both passes exchange, over fsdp or tensor
            tokens, teacher = shard.after(batch.tokens, teacher)
            batch = batch._replace(tokens=tokens)

        def loss_of(base: Weights) -> tuple[jax.Array, tuple]:
            model = self.parts.merge({**base, GATE: gate}, frozen, shard)
            lengths = jnp.full(batch.tokens.shape[0], batch.tokens.shape[1])

            def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
                context = model.prefill_context(layer, q, k, v, lengths)
                fixed = jax.lax.stop_gradient
                constant = model.prefill_context(layer, fixed(q), fixed(k), fixed(v), lengths)
                dense = layer_of(constant, batch, self.block_size, model.config.rope, self.statistic)
                target = dense.attend(constant.q_rotated, block_scores=True).block_scores
                report = distil_prefill(dense, layer.prefill_gate, target, weights.rows, self.recall_density)
                lists = layer.policy.blocks(layer.policy.prepare(constant))
                assert lists is not None
                out = block_sparse_attention(
                    context.q_rotated, context.k_rotated, context.v, lists, density=self.density
                )
                return out, state, report

            segments = model.segments(policy, model.prefill_gate, model.config.num_heads, "prefill")
            hidden, _, report = model.scan(batch.tokens, attend, segments=segments, remat=True)
            head, hidden = model.whole_head(hidden)
            if teacher is not None:
                return distillation_loss(hidden, teacher, head, weights.tokens, shard), report
            targets = lm_targets(batch.tokens, batch.segment_ids)[0]
            return lm_loss(hidden, head, targets, weights.tokens, shard), report

        (loss, report), gradients = jax.value_and_grad(loss_of, has_aux=True)(base)
        of_gate = nnx.to_pure_dict(nnx.state(report.gradient))
        gradients[GATE] = jax.tree.map(lambda x: self.weight * x, of_gate)
        sums = {self._name: loss, "prefill_loss": report.loss.sum()}
        sums |= {"prefill_recall": report.recall.sum(), "prefill_recall_weight": report.recall_weight.sum()}
        return gradients, sums

    def _teacher(
        self, trained: Weights, frozen: FrozenWeights, batch: Batch, shard: Shard | None
    ) -> Float[Array, "B T E"]:
        """The last hidden states with dense attention and an adapter that adds nothing, without gradients."""
        without = {name: w if name == GATE else jax.tree.map(jnp.zeros_like, w) for name, w in trained.items()}
        model = self.parts.merge(without, frozen, shard)
        return jax.lax.stop_gradient(dense_hidden(model, batch.tokens, batch.positions))

    @property
    def _name(self) -> str:
        """Name of the model's loss among the metrics."""
        return "kl_loss" if self.distils else "lm_loss"

    def metrics(self, sums: Sums) -> dict[str, Float32[Array, ""]]:
        """The model's loss under sparse attention in nats per token (`lm_loss`, its mean cross-entropy, or `kl_loss`, its mean divergence
        from dense attention), the gate's loss and recall, and the weighted sum of both losses."""
        seen = sums["prefill_recall_weight"]
        return {
            "loss": sums[self._name] + self.weight * sums["prefill_loss"],
            self._name: sums[self._name],
            "prefill_loss": sums["prefill_loss"],
            "prefill_recall": sums["prefill_recall"] / jnp.where(seen > 0, seen, 1),
        }

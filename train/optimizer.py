"""The optimizer: AdamW with warmup, cosine decay and clipping."""

from typing import Any

import jax
import optax

from seer_jax.folders import GATE_FOLDERS
from seer_jax.train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: `peak * (step + 1) / warmup` while it warms up, then a half cosine down to `end_learning_rate`
    at `steps`.

    The first step learns. Schedules that rise from 0, as the one that the authors trained with, spend it on an update of size 0; all
    steps after the warmup have the same learning rate as there.
    """
    warmup, peak = config.warmup(steps), config.learning_rate
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    decay = optax.cosine_decay_schedule(peak, steps - warmup, config.end_learning_rate / peak)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, *, gate_scale: float = 1.0) -> optax.GradientTransformation:
    """AdamW with schedule and clipping. Initialise it with the trained weights alone: its state is twice their size.

    Args:
      gate_scale: learning rate of gates as a multiple of the others'.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    parts = [adamw] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm), adamw]
    if gate_scale != 1:
        parts.append(optax.masked(optax.scale(gate_scale), _gates))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _gates(weights: dict[str, Any]) -> dict[str, Any]:
    """Which weights are those of gates."""
    return {name: jax.tree.map(lambda _, is_gate=name in GATE_FOLDERS: is_gate, part) for name, part in weights.items()}

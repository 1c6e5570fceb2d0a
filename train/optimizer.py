"""The optimizer: AdamW with warmup, cosine decay and clipping."""

import optax

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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with schedule and clipping. Initialise it with the trained weights alone: its state is twice their size."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

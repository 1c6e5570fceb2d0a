"""Losses of given tokens and logarithms of probabilities, also where each device has logits of its part of the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from seer_jax.sharding.shard import Shard


def score_targets(
    logits: Float32[Array, "*b v"], targets: Int[Array, "*b"], shard: Shard | None
) -> tuple[Float32[Array, "*b"], Bool[Array, "*b"]]:
    """-log p of each target in nats, and whether it is the most likely token, the first one of equals.

    Args:
      logits: of the whole vocabulary, or of the device's part of it; finite.
      targets: tokens of the whole vocabulary.
      shard: of the device; None: logits are of all tokens.
    """
    if shard is None or shard.layout.size(*shard.layout.tensor) == 1:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, logits.argmax(-1) == targets
    axes, size = shard.layout.tensor, logits.shape[-1]
    first = shard.index(axes) * size
    best = jax.lax.stop_gradient(logits.max(-1))
    largest = shard.max(best, axes)
    place = targets - first
    here = (place >= 0) & (place < size)
    chosen = jnp.take_along_axis(logits, jnp.where(here, place, 0)[..., None], axis=-1)[..., 0]
    sums = jnp.exp(logits - largest[..., None]).sum(-1), jnp.where(here, chosen, 0)
    total, chosen = shard.sum(jnp.stack(sums), axes)
    behind = size * shard.layout.size(*axes)
    likeliest = jax.lax.pmin(jnp.where(best == largest, first + logits.argmax(-1), behind), axes)
    return jnp.log(total) + largest - chosen, likeliest == targets


def log_probabilities(logits: Float32[Array, "*b v"], shard: Shard | None) -> Float32[Array, "*b v"]:
    """Logarithm of the softmax over the whole vocabulary; arguments as in `score_targets`."""
    if shard is None or shard.layout.size(*shard.layout.tensor) == 1:
        return jax.nn.log_softmax(logits, axis=-1)
    axes = shard.layout.tensor
    largest = shard.max(jax.lax.stop_gradient(logits.max(-1)), axes)[..., None]
    total = shard.sum(jnp.exp(logits - largest).sum(-1), axes)[..., None]
    return logits - largest - jnp.log(total)

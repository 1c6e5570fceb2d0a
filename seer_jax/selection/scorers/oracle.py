"""Scores of an oracle."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import attention_with_block_scores
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Scorer):
    """The true block maxima of the attention map, which gates are distilled from. Costs a dense pass."""

    name = "oracle"
    title = "oracle"
    meaning = (
        "the blocks with the largest true attention weights, at the cost of the dense attention that it should save"
    )

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        scored = attention_with_block_scores(
            context.q_rotated,
            context.k_rotated,
            context.v,
            block_size=context.block_size,
            lengths=context.lengths,
            query_offset=context.offset,
        )
        assert scored.block_scores is not None
        return jnp.log(scored.block_scores)

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        return _block_maxima(context.q_rotated[:, 0], context.cache.keys, context.position, context.block_size)


def _block_maxima(
    q: Float[Array, "B H D"], keys: Float[Array, "B S K D"], position: Int[Array, "B"], block_size: int
) -> Float32[Array, "B K Sb"]:
    """Log of the largest attention probability within each block, over the group's query heads."""
    grouped = q.reshape(q.shape[0], keys.shape[2], -1, q.shape[-1]).astype(jnp.float32)
    # In float32 on accelerators too, which multiply in lower precision unless asked.
    logits = jnp.einsum("bkgd,bskd->bkgs", grouped, keys.astype(jnp.float32), precision="highest") * q.shape[-1] ** -0.5
    visible = jnp.arange(keys.shape[1])[None, None, None] <= position[:, None, None, None]
    logits = jax.nn.log_softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    pad = -keys.shape[1] % block_size
    logits = jnp.pad(logits.max(2), ((0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:2], -1, block_size).max(-1)

"""Scores that need no look at queries or keys: the first block and the latest ones."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkWindow(Scorer):
    """StreamingLLM (arXiv 2309.17453) in blocks: the first block, which holds the attention sinks, then the most recent ones.

    With a rule that keeps a fixed number of blocks, such as `TokenBudget`, these are the paper's sink and window.
    """

    name = "window"
    title = "sink+window"
    meaning = "the first block and the latest ones (StreamingLLM)"
    reads_in_chunks = True

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B 1 Tb Sb"]:
        return jnp.broadcast_to(
            _recency(context.num_key_blocks), (context.batch, 1, context.num_rows, context.num_key_blocks)
        )

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        return jnp.broadcast_to(_recency(context.num_key_blocks), context.shape)


def _recency(num_blocks: int) -> Float32[Array, "Sb"]:
    """Ranks the first block above all, then the latest ones."""
    return jnp.arange(num_blocks).at[0].set(num_blocks).astype(jnp.float32)

"""Scores of Quest: upper bounds by the smallest and largest keys of a block."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import pool_blocks
from pallas_kernels.precision import precise_einsum
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.estimates import grouped, log_shares
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest(Scorer):
    """Upper bound of a block's logits (Quest, arXiv 2406.10774, sec. 3.3).

      bound(j) = sum_d max(q_d max_j(k_d), q_d min_j(k_d)) / sqrt(D)

    over the keys of block j after RoPE. Heads that read one key head share a list: the score of a block is the largest log-softmax of
    its bounds over the completed blocks among them. The token's own block is always kept; the first two layers are dense in
    the paper (`dense_layers=2`). The paper keeps the bounds of each page; here every key is read again for each token.
    """

    name = "quest"
    title = "Quest"
    meaning = "upper bounds of the logits by the smallest and largest keys of a block (Quest)"
    by_default = False

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        # Of keys alone, whatever the position: tokens that share keys share these. Only completed blocks are read below.
        pooled = pool_blocks(context.cache.keys, ("max", "min"), block_size=context.block_size)
        queries = grouped(context.q_rotated.astype(jnp.float32), pooled.shape[2])
        # q_d selects the largest key where it is positive and the smallest where it is negative.
        queries = jnp.concatenate([jnp.maximum(queries, 0), jnp.minimum(queries, 0)], axis=-1)
        bounds = precise_einsum("btkgd,bskd->bkgts", queries, pooled)[:, :, :, 0] * context.q.shape[-1] ** -0.5
        completed = jnp.arange(context.num_key_blocks)[None, None, None] < context.current[..., None]
        return log_shares(bounds, completed).max(2)

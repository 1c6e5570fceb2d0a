"""Scores of ProxyAttn: token scores of one head that stands for a group."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import attention_with_block_scores
from seer_jax.selection.context import PrefillContext
from seer_jax.selection.estimates import grouped, log
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProxyAttn(Scorer):
    """Attention of proxy heads, one for each key/value head (ProxyAttn, arXiv 2509.24745).

    A proxy's query is the mean of the query heads of its group. The score of a block is the largest attention probability in it, from
    the products of all tokens; the heads of a group share it.

    Built from the paper's abstract and summaries of it, which agree on what is here: queries are pooled over the heads of a group, products are taken
    token by token, and the pooled head's scores stand for its group. Its full text and code were not compared. They may use other groups than those of the key/value
    heads, leave out tokens, and pool the scores of a block otherwise. How many blocks a head keeps, which the paper estimates for each head, is left to the rule.
    """

    name = "proxyattn"
    title = "ProxyAttn"
    meaning = "the largest attention weights of one mean query head per key/value head (ProxyAttn)"
    reads_in_chunks = True
    by_default = False

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B K Tb Sb"]:
        proxies = grouped(context.q_rotated, context.num_kv_heads).mean(3, dtype=jnp.float32)
        if context.shard is not None:
            proxies = context.shard.mean_of_group(proxies)
        scored = attention_with_block_scores(
            proxies.astype(context.q.dtype),
            context.k_rotated,
            context.v,
            block_size=context.block_size,
            lengths=context.lengths,
            query_offset=context.offset,
        )
        assert scored.block_scores is not None
        return log(scored.block_scores)

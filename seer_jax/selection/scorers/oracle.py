"""Scores of two oracles: the true attention, by largest weight and by mass."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import attention_with_block_scores
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.estimates import by_block, grouped, log, log_shares, product
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
    reads_in_chunks = True

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        return jnp.log(_attention_by_block(context, "max"))

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        return by_block(_new_token_attention(context).max(2), context.block_size, -jnp.inf).max(-1)


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MassOracle(Scorer):
    """The true attention mass of each block: the sum of the attention probabilities of its keys. Costs a dense pass.

    Prefill: the mass of the query that cares most, max over the queries t of block row i of sum over the keys s of block j of A[t, s],
    each row divided by its sum.
    Decode: the mean of the mass over the query heads that read one key head.
    """

    name = "oracle-mass"
    title = "oracle by mass"
    meaning = "the blocks with the largest true attention mass, at the cost of the dense attention that it should save"
    reads_in_chunks = True
    by_default = False

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        return log(_attention_by_block(context, "mass"))

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        return log(by_block(jnp.exp(_new_token_attention(context)).mean(2), context.block_size).sum(-1))


def _attention_by_block(context: PrefillContext, statistic: str) -> Float32[Array, "B H Tb Sb"]:
    """The block scores of dense attention, each row divided by its sum."""
    scored = attention_with_block_scores(
        context.q_rotated,
        context.k_rotated,
        context.v,
        block_size=context.block_size,
        statistic=statistic,
        lengths=context.lengths,
        query_offset=context.offset,
    )
    assert scored.block_scores is not None
    return scored.block_scores


def _new_token_attention(context: DecodeContext) -> Float32[Array, "B K G S"]:
    """Logarithms of the attention probabilities of the newest token."""
    keys = context.cache.keys
    q = grouped(context.q_rotated, keys.shape[2])[:, 0]
    logits = product("bkgd,bskd->bkgs", q, keys) * q.shape[-1] ** -0.5
    return log_shares(logits, jnp.arange(keys.shape[1])[None, None, None] <= context.position[:, None, None, None])

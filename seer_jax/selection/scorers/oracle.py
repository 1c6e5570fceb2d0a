"""Scores of two oracles: the true attention, by largest weight and by mass."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import attention_with_block_scores
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.estimates import by_block, grouped, log, log_shares, padded, product, without
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
        return by_block(_new_token_attention(context).max(2), context.block_size, -jnp.inf).max(-1)


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MassOracle(Scorer):
    """The true attention mass of each block: the sum of the attention probabilities of its keys. Costs a dense pass.

    Prefill: the mass that the query cares most about, max over the queries t of block row i of sum over the keys s of block j of A[t, s].
    Decode: the mean of the mass over the query heads that read one key head.
    """

    name = "oracle-mass"
    title = "oracle by mass"
    meaning = "the blocks with the largest true attention mass, at the cost of the dense attention that it should save"
    by_default = False

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        b, (batch, keys, kv_heads, dim) = context.block_size, context.k.shape
        k = jnp.moveaxis(without(context.k_rotated, context.valid_keys), 2, 1)
        queries = grouped(padded(without(context.q_rotated, context.valid_queries), b), kv_heads)
        # Block rows first, and the queries that read one key head together, so that each row is one product.
        queries = queries.reshape(batch, -1, b, *queries.shape[2:]).transpose(1, 0, 3, 4, 2, 5)
        queries = queries.reshape(context.num_rows, batch, kv_heads, -1, dim)
        lengths = context.lengths[:, None, None, None, None]

        def of_row(x: tuple[Array, Array]) -> Float32[Array, "B K G Sb"]:
            row, q = x
            position = (row * b + jnp.arange(b))[None, None, None, :, None]
            logits = product("bkqd,bksd->bkqs", q, k).reshape(batch, kv_heads, -1, b, keys) * dim**-0.5
            seen = jnp.arange(keys)[None, None, None, None] <= position
            shares = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
            return jnp.where(position < lengths, by_block(shares, b).sum(-1), 0).max(3)

        rows = context.first_row + jnp.arange(context.num_rows)
        mass = jax.lax.map(of_row, (rows, queries))  # one at a time, for memory
        return log(jnp.moveaxis(mass, 0, 3).reshape(batch, -1, context.num_rows, context.num_key_blocks))

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        return log(by_block(jnp.exp(_new_token_attention(context)).mean(2), context.block_size).sum(-1))


def _new_token_attention(context: DecodeContext) -> Float32[Array, "B K G S"]:
    """Logarithms of the attention probabilities of the newest token."""
    keys = context.cache.keys
    q = grouped(context.q_rotated, keys.shape[2])[:, 0]
    logits = product("bkgd,bskd->bkgs", q, keys) * q.shape[-1] ** -0.5
    return log_shares(logits, jnp.arange(keys.shape[1])[None, None, None] <= context.position[:, None, None, None])

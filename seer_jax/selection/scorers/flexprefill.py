"""Scores of FlexPrefill: pooled queries and keys, or columns and diagonals, whichever fits a head."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from pallas_kernels import pool_blocks, score_blocks
from pallas_kernels.precision import precise_einsum
from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.estimates import attend_last, by_block, columns_and_diagonals, grouped, log_shares
from seer_jax.selection.scorers.base import Scorer, register


class _Patterns(NamedTuple):
    """What the chunks of a prompt share.

    Fields:
      keys: mean key of each block.
      vertical, slash: attention of the last queries by key blocks, and by blocks of distances.
      query_aware: heads whose blocks are ranked by pooled queries and keys.
    """

    keys: Float32[Array, "B Sb K D"]
    vertical: Float32[Array, "B H Sb"]
    slash: Float32[Array, "B H Sb"]
    query_aware: Bool[Array, "B H"]


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlexPrefill(Scorer):
    """One of two patterns for each head (FlexPrefill, arXiv 2502.20766, sec. 3).

    The last b queries of a prompt tell which: their attention summed over key blocks, p, is compared with the softmax q of their mean
    against the mean key of each block. Where sqrt(JS(p, q)) < tau, pooling is a good estimate and the head is query-aware: the
    score of a block is mean query . mean key / sqrt(D), after RoPE. Otherwise the head is vertical-slash: the score is the larger
    of the attention that the last queries give to the block's column and to its diagonal. The first and the own block are
    always kept.

    The authors' code (read in a fork of it) has the same p, q, divergence, tau = 0.1 and blocks that are always kept, for blocks of 128 tokens. Few heads are
    query-aware by them: 4% of SmolLM2-135M's at 1024 and at 2048 tokens, where the median divergence is 0.43. It differs in how many blocks a head
    keeps, which is the rule's part here: its gamma (0.9) is the attention to cover, in vertical-slash heads by columns and by diagonals apart, each
    counted in tokens, and in query-aware heads by the blocks of the whole map, ranked together, where the rule `mass` covers each block row. Its least budget
    of 512 tokens of columns and of diagonals in every head, and dense attention up to that length, are left out: at 1k to 2k tokens they keep most blocks, while
    this scorer is as sparse as its rule.

    Attributes:
      tau: in [0, 1]; 0 makes every head vertical-slash.
    """

    name = "flexprefill"
    title = "FlexPrefill"
    meaning = "mean queries against mean keys, or columns and diagonals of the last queries (FlexPrefill)"
    by_default = False

    tau: float = dataclasses.field(default=0.1, metadata=dict(static=True))

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau <= 1:
            raise ValueError(f"FlexPrefill.tau must lie in [0, 1]; got {self.tau!r}.")

    def prepare(self, context: PrefillContext) -> _Patterns:
        last, b = attend_last(context, context.block_size), context.block_size
        vertical, slash = (by_block(x, b).sum(-1) for x in (last.vertical, last.slash))
        keys = pool_blocks(context.k_rotated, ("avg",), block_size=b, valid=context.valid_keys)
        queries = grouped(last.mean[:, None], keys.shape[2])
        logits = precise_einsum("btkgd,bskd->bkgts", queries, keys).reshape(vertical.shape) * keys.shape[-1] ** -0.5
        begun = jnp.arange(context.num_key_blocks)[None, None] * b < context.lengths[:, None, None]
        pooled = jnp.exp(log_shares(logits, begun))
        return _Patterns(keys, vertical, slash, _divergence(vertical, pooled) < self.tau)

    def keep(self, context: Context) -> Bool[Array, "..."]:
        return context.sink_and_own

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        patterns = self.prepare(context) if context.prepared is None else context.prepared
        queries = pool_blocks(context.q_rotated, ("avg",), block_size=context.block_size, valid=context.valid_queries)
        pooled = score_blocks(queries, patterns.keys, causal=True, row_offset=context.first_row)
        lines = columns_and_diagonals(patterns.vertical, patterns.slash, context)
        return jnp.where(patterns.query_aware[..., None, None], pooled, lines)


def _divergence(p: Float32[Array, "*rows Sb"], q: Float32[Array, "*rows Sb"]) -> Float32[Array, "*rows"]:
    """Square root of the Jensen-Shannon divergence, in nats."""
    middle = (p + q) / 2

    def relative(x: Array) -> Array:
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x / middle, 1)), 0).sum(-1)

    return jnp.sqrt(jnp.maximum((relative(p) + relative(q)) / 2, 0))

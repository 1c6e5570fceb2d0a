"""Scores of MInference: columns and diagonals that the last queries look at."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.estimates import attend_last, by_block, columns_and_diagonals
from seer_jax.selection.scorers.base import Scorer, register

LAST_QUERIES = 64
FIRST_COLUMNS, FIRST_DIAGONALS = 30, 100  # tokens; always kept


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MInference(Scorer):
    """The vertical-slash pattern (MInference, arXiv 2407.02490, sec. 3.2), for every head.

    The attention of the last 64 queries, summed over the queries, ranks the columns (keys) and diagonals (distances between query
    and key). The score of a block is the largest value of the columns in it and of the diagonals that cross it, so that the
    best blocks are those which the best columns and diagonals touch. The first 30 columns and the 100 nearest diagonals are
    always kept. The paper's two budgets per head are replaced by one rule for both.
    """

    name = "minference"
    title = "MInference"
    meaning = "columns and diagonals that the last 64 queries attend to (MInference)"
    by_default = False

    def prepare(self, context: PrefillContext) -> tuple[Float32[Array, "B H Sb"], Float32[Array, "B H Sb"]]:
        last = attend_last(context, LAST_QUERIES)
        columns, distances = (by_block(x, context.block_size) for x in (last.vertical, last.slash))
        # Block n of the diagonals is crossed by distances from (n - 1) b + 1 to (n + 1) b - 1.
        nearer = jnp.pad(distances[:, :, :-1, 1:].max(-1, initial=0), ((0, 0), (0, 0), (1, 0)))
        return columns.max(-1), jnp.maximum(distances.max(-1), nearer)

    def keep(self, context: Context) -> Bool[Array, "..."]:
        assert isinstance(context, PrefillContext)
        b = context.block_size
        row = (context.first_row + jnp.arange(context.num_rows))[:, None]
        column = jnp.arange(context.num_key_blocks)[None]
        near = (row - column - 1) * b + 1 < FIRST_DIAGONALS
        return ((column * b < FIRST_COLUMNS) | (near & (column <= row)))[None, None]

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        columns, diagonals = self.prepare(context) if context.prepared is None else context.prepared
        return columns_and_diagonals(columns, diagonals, context)

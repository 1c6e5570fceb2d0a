"""Random scores: the baseline that any scorer must beat."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from seer_jax.checks import check_seed
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Random(Scorer):
    """Blocks at random, other ones in each layer.

    Attributes:
      seed: of the pseudo-random ranking.
    """

    name = "random"
    title = "random"
    meaning = "blocks at random, besides those always kept"

    seed: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_seed("Random.seed", self.seed)

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        key = jax.random.fold_in(jax.random.key(self.seed), context.layer)
        blocks = context.num_key_blocks
        # Drawn for all rows of the sequence, so that a row's scores do not depend on how the rows are cut into chunks.
        scores = jax.random.uniform(key, (context.batch, context.q.shape[2], blocks, blocks), jnp.float32)
        return jax.lax.dynamic_slice_in_dim(scores, context.first_row, context.num_rows, axis=2)

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        key = jax.random.fold_in(jax.random.key(self.seed), context.layer)

        def draw(position: Int[Array, ""]) -> Float32[Array, "K Sb"]:  # of one row, whatever its neighbours do
            return jax.random.uniform(jax.random.fold_in(key, position), context.shape[1:], jnp.float32)

        return jax.vmap(draw)(context.position)

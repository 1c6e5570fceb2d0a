"""Random scores: the baseline that any scorer must beat."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from seer_jax.checks import check_seed
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register
from seer_jax.sharding.shard import part_of
from seer_jax.sharding.table import KV, ROWS, TENSOR


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
        shape = context.batch, context.q.shape[2], blocks, blocks
        scores = part_of(
            context.shard, lambda shape: jax.random.uniform(key, shape, jnp.float32), shape, (ROWS, TENSOR)
        )
        return jax.lax.dynamic_slice_in_dim(scores, context.first_row, context.num_rows, axis=2)

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        key = jax.random.fold_in(jax.random.key(self.seed), context.layer)

        def draw(position: Int[Array, ""]) -> Float32[Array, "K Sb"]:  # of one row, whatever its neighbours do
            own = jax.random.fold_in(key, position)
            return part_of(
                context.shard, lambda shape: jax.random.uniform(own, shape, jnp.float32), context.shape[1:], (KV,)
            )

        return jax.vmap(draw)(context.position)

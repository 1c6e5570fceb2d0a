"""Random scores: the baseline that any scorer must beat."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from seer_jax.checks import check_seed
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.scorers.base import Scorer, register
from seer_jax.sharding.shard import part_of
from seer_jax.sharding.table import KV, TENSOR


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
    reads_in_chunks = True

    seed: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self) -> None:
        check_seed("Random.seed", self.seed)

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        key = jax.random.fold_in(jax.random.key(self.seed), context.layer)
        rows = context.first_row + jnp.arange(context.num_rows)

        def draw(shape: tuple[int, ...]) -> Float32[Array, "H Tb Sb"]:
            # Of each row and block by their numbers, so that scores depend neither on how rows are cut into chunks nor on the room that a
            # cache has. Sequences of a batch have the same ones, so that they do not depend on the batch.
            heads, _, blocks = shape
            of_row = jax.vmap(
                lambda row: jax.random.uniform(jax.random.fold_in(key, row), (blocks, heads), jnp.float32)
            )
            return jnp.transpose(of_row(rows), (2, 0, 1))

        scores = part_of(context.shard, draw, (context.q.shape[2], context.num_rows, context.num_key_blocks), (TENSOR,))
        return jnp.broadcast_to(scores, (context.batch, *scores.shape))

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        key = jax.random.fold_in(jax.random.key(self.seed), context.layer)

        def draw(position: Int[Array, ""]) -> Float32[Array, "K Sb"]:  # of one row, whatever its neighbours do
            own = jax.random.fold_in(key, position)

            # Of each block by its number, whatever room the cache has.
            return part_of(
                context.shard,
                lambda shape: jax.random.uniform(own, shape[::-1], jnp.float32).T,
                context.shape[1:],
                (KV,),
            )

        return jax.vmap(draw)(context.position)

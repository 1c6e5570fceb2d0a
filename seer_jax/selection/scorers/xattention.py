"""Scores of XAttention: sums of antidiagonals."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from seer_jax.checks import whole_number
from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.estimates import log, padded, product, without
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XAttention(Scorer):
    """Antidiagonal scoring (XAttention, arXiv 2503.16428, sec. 2.1).

    With stride s, x[i, j] = sum_p q[i s + s - 1 - p] . k[j s + p] / (s sqrt(D)): the antidiagonal of each s x s tile of the attention
    map. A softmax over the causal tiles of each strided row, summed over the tiles of a block, is the block's score. The paper
    selects by cumulative mass (the rule `mass`) and keeps the first and the own block.

    Attributes:
      stride: s; divides the block size. The paper uses 8 and 16.
    """

    name = "xattention"
    title = "XAttention"
    meaning = "sums of antidiagonals of the attention logits (XAttention)"
    reads_in_chunks = True
    by_default = False

    stride: int = dataclasses.field(default=8, metadata=dict(static=True))

    def __post_init__(self) -> None:
        whole_number("XAttention.stride", self.stride)

    def check_block_size(self, block_size: int) -> None:
        if block_size % self.stride:
            raise ValueError(
                f"XAttention.stride must divide the block size of {block_size} tokens; got {self.stride}. Use 8 or 16."
            )

    def prepare(self, context: PrefillContext) -> Float[Array, "B Ss s K D"]:
        self.check_block_size(context.block_size)
        keys = padded(without(context.k_rotated, context.valid_keys), context.block_size)
        return keys.reshape(len(keys), -1, self.stride, *keys.shape[2:])

    def keep(self, context: Context) -> Bool[Array, "..."]:
        return context.sink_and_own

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        keys = self.prepare(context) if context.prepared is None else context.prepared
        queries = padded(without(context.q_rotated, context.valid_queries), context.block_size)
        queries = queries.reshape(len(queries), -1, self.stride, *queries.shape[2:])[:, :, ::-1]
        by_head = jnp.moveaxis(queries.reshape(*queries.shape[:3], keys.shape[3], -1, queries.shape[-1]), 3, 0)
        per_block = context.block_size // self.stride
        row = (context.first_row * per_block + jnp.arange(queries.shape[1]))[None, None, :, None]
        column = jnp.arange(keys.shape[1])[None, None, None]
        lengths = context.lengths[:, None, None, None]
        seen = (column <= row) & (column * self.stride < lengths)
        inside = row * self.stride < lengths

        def of_group(x: tuple[Array, Array]) -> Float32[Array, "B G Tb Sb"]:  # one at a time, for memory
            logits = product("bipgd,bjpd->bgij", *x) * (self.stride * context.q.shape[-1] ** 0.5) ** -1
            shares = jnp.where(inside, jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1), 0)
            tiles = shares.reshape(*shares.shape[:2], context.num_rows, per_block, context.num_key_blocks, per_block)
            return tiles.sum((3, 5))

        sums = jnp.moveaxis(jax.lax.map(of_group, (by_head, jnp.moveaxis(keys, 3, 0))), 0, 1)
        return log(sums.reshape(len(queries), -1, *sums.shape[3:]))

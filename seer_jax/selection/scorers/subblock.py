"""Scores of SubBlock: log-sum-exp over the means of sub-blocks."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from pallas_kernels.precision import precise_einsum
from seer_jax.checks import whole_number
from seer_jax.selection.context import Context, DecodeContext, PrefillContext
from seer_jax.selection.estimates import grouped, log_shares, means
from seer_jax.selection.scorers.base import Scorer, register


@register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubBlock(Scorer):
    """Log-sum-exp of sub-block means (SubBlock of SGLang, github.com/sgl-project/sglang/pull/34148; no paper).

      score(i, j) = log sum_{a, c} exp(mean(q of sub-block a of i) . mean(k of sub-block c of j) / sqrt(D))

    over the sub-blocks of each block, after RoPE: an estimate of the block's unnormalised softmax mass. Here c starts no later than a
    ends, as attention is causal. While decoding, the query is the token's own, and the score is the share of the completed
    blocks' mass, in the mean over the query heads that read one key head. The own block is always kept, and the first one, which the
    original does not reserve: it is made for diffusion models, and means hide the single key that is the attention sink of a
    language model.

    Attributes:
      parts: sub-blocks per block; divides the block size.
    """

    name = "subblock"
    title = "SubBlock"
    meaning = "log-sum-exp of the means of sub-blocks (SubBlock)"
    reads_in_chunks = True
    by_default = False

    parts: int = dataclasses.field(default=4, metadata=dict(static=True))

    def __post_init__(self) -> None:
        whole_number("SubBlock.parts", self.parts)

    def check_block_size(self, block_size: int) -> None:
        if block_size % self.parts:
            raise ValueError(
                f"SubBlock.parts must divide the block size of {block_size} tokens; got {self.parts}. Use 1, 2, 4 or 8."
            )

    def prepare(self, context: PrefillContext) -> tuple[Float32[Array, "B n K D"], Bool[Array, "B n"]]:
        return means(context.k_rotated, context.valid_keys, self._size(context.block_size), context.block_size)

    def keep(self, context: Context) -> Bool[Array, "..."]:
        return context.sink_and_own

    def prefill_scores(self, context: PrefillContext) -> Float32[Array, "B H Tb Sb"]:
        keys, some_keys = self.prepare(context) if context.prepared is None else context.prepared
        size = self._size(context.block_size)
        queries, some_queries = means(context.q_rotated, context.valid_queries, size, context.block_size)
        row = (context.first_row * self.parts + jnp.arange(queries.shape[1]))[None, :, None]
        seen = (jnp.arange(keys.shape[1])[None, None] <= row) & some_queries[:, :, None] & some_keys[:, None]

        def of_group(x: tuple[Array, Array]) -> Float32[Array, "B G Tb Sb"]:  # one at a time, for memory
            logits = precise_einsum("bigd,bjd->bgij", *x) * context.q.shape[-1] ** -0.5
            logits = jnp.where(seen[:, None], logits, -jnp.inf)
            pairs = logits.reshape(*logits.shape[:2], context.num_rows, self.parts, context.num_key_blocks, self.parts)
            return jax.nn.logsumexp(pairs, axis=(3, 5))

        by_head = jnp.moveaxis(grouped(queries, keys.shape[2]), 2, 0)
        scores = jnp.moveaxis(jax.lax.map(of_group, (by_head, jnp.moveaxis(keys, 2, 0))), 0, 1)
        return scores.reshape(len(queries), -1, *scores.shape[3:])

    def decode_scores(self, context: DecodeContext) -> Float32[Array, "B K Sb"]:
        # Of keys alone, whatever the position: tokens that share keys share these. Only completed blocks are read below.
        every = jnp.ones((1, context.cache.capacity), bool)
        keys, _ = means(context.cache.keys, every, self._size(context.block_size), context.block_size)
        queries = grouped(context.q_rotated.astype(jnp.float32), keys.shape[2])
        logits = precise_einsum("btkgd,bskd->bkgts", queries, keys)[:, :, :, 0] * keys.shape[-1] ** -0.5
        logits = logits.reshape(*logits.shape[:3], -1, self.parts)
        completed = jnp.arange(context.num_key_blocks)[None, None, None] < context.current[..., None]
        shares = log_shares(jax.nn.logsumexp(logits, axis=-1), completed)
        return jax.nn.logsumexp(shares, axis=2) - jnp.log(shares.shape[2])

    def _size(self, block_size: int) -> int:
        """Tokens of a sub-block."""
        self.check_block_size(block_size)
        return block_size // self.parts

"""What may become of the lists of trained gates: layers that share them, and heads that need none."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import BlockIndices
from pallas_kernels.online_softmax import dot
from seer_jax.evaluate.window import decode_window
from seer_jax.models.attention import prefill_attention
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext
from seer_jax.models.dense_attention import dense_attention
from seer_jax.selection.context import Context, DecodeContext, PrefillContext
from seer_jax.selection.interfaces import LayerGate
from seer_jax.selection.policies import Given, Policy
from seer_jax.selection.rules import RankingPolicy

QUERIES = 256  # whose attention weights exist at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalHeads(Policy):
    """The lists of a policy, and the first and the latest blocks for heads that attend to those.

    Attributes:
      policy: of the other heads.
      local: `[L, heads]`, above 0.5 for the heads that read the first block and the latest ones alone.
      latest: number of the latest blocks, a token's own among them.
    """

    name = "local-heads"
    per_head = ("local",)

    policy: RankingPolicy
    local: Float[Array | np.ndarray, "..."]
    latest: int = dataclasses.field(default=4, metadata=dict(static=True))

    @property
    def needs_gate(self) -> bool:
        return self.policy.needs_gate

    def tokens_per_block(self, gate: LayerGate | None) -> int:
        return self.policy.tokens_per_block(gate)

    def prepare(self, context: PrefillContext) -> PrefillContext:
        return self.policy.prepare(context)

    def blocks(self, context: Context) -> BlockIndices:
        blocks = self.policy.blocks(context)
        assert blocks is not None  # of a rule
        mask, column = blocks.to_mask(context.num_key_blocks), jnp.arange(context.num_key_blocks)
        if isinstance(context, PrefillContext):
            local, column = self.local[None, :, None, None], column[None, None, None]
            row = (context.first_row + jnp.arange(context.num_rows))[None, None, :, None]
        else:
            local, column, row = self.local[None, :, None], column[None, None], context.current
        near = (column == 0) | ((column <= row) & (column > row - self.latest))
        near, local = (jnp.broadcast_to(x, mask.shape) for x in (near, local))
        return context.of_mask(jnp.where(local > 0.5, near, mask))


@functools.partial(jax.jit, static_argnames=("latest", "block_size"))
def local_mass(model: Transformer, tokens: Int[Array, "1 T"], latest: int, block_size: int) -> Float32[Array, "L H"]:
    """Share of the attention mass of each head that lies in the first block and the `latest` ones, under dense attention."""

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, jnp.full(1, q.shape[1], jnp.int32))
        q, k = context.q_rotated[0], context.k_rotated[0]
        count, heads, dim = q.shape
        size = max(n for n in range(1, min(QUERIES, count) + 1) if count % n == 0)
        places = jnp.arange(count).reshape(-1, size)

        def part(places: Int[Array, "n"]) -> Float32[Array, "H"]:
            grouped = q[places].reshape(size, k.shape[1], -1, dim)
            logits = dot("nkgd,skd->kgns", grouped, k).reshape(heads, size, -1) * dim**-0.5
            key, query = jnp.arange(count)[None], places[:, None]
            weights = jax.nn.softmax(jnp.where((key <= query)[None], logits, -jnp.inf), axis=-1)
            block, own = key // block_size, query // block_size
            return (weights * ((block == 0) | (block > own - latest))[None]).sum((1, 2))

        out = dense_attention(context.q_rotated, context.k_rotated, context.v)
        return out, state, jax.lax.map(part, places).sum(0) / count

    return model.scan(tokens, attend)[2]


@jax.jit
def shared_masks(
    model: Transformer, tokens: Int[Array, "B T"], policy: Policy, source: Int[Array, "L H"], shares: Bool[Array, "L"]
) -> Bool[Array, "L B H Tb Sb"]:
    """The blocks that each layer of a prompt reads where some layers read the lists of the layer before.

    Args:
      policy: that makes the lists, of the prefill gate's scores.
      source: head of the layer before whose list a head reads.
      shares: layers that do; a layer before one must not, nor may the first.
    """
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    gate, heads = model.prefill_gate, model.config.num_heads
    block_size = policy.tokens_per_block(gate)
    count = -(-tokens.shape[1] // block_size)

    def attend(layer: LayerContext, before: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = layer.policy.prepare(model.prefill_context(layer, q, k, v, lengths))
        blocks = layer.policy.blocks(context)
        assert blocks is not None  # of a rule
        own = jnp.broadcast_to(blocks.to_mask(count), before.shape)
        mask = jnp.where(shares[layer.index], before[:, source[layer.index]], own)
        out, _ = prefill_attention(Given(mask, block_size), context)
        return out, mask, mask

    before = jnp.zeros((len(tokens), heads, count, count), bool)
    return model.scan(tokens, attend, before, segments=model.segments(policy, gate, heads, "prefill"))[2]


@jax.jit
def decode_masks(model: Transformer, tokens: Int[Array, "B T"], policy: Policy) -> Bool[Array, "L B K T Sb"]:
    """The blocks that each token of windows reads in each layer."""

    def observe(context: DecodeContext) -> Bool[Array, "K Sb"]:
        blocks = policy.blocks(context)
        assert blocks is not None  # of a rule
        return blocks.to_mask(context.num_key_blocks)[0]

    return jnp.moveaxis(decode_window(model, tokens, policy, observe=observe).observed, 2, 3)


@jax.jit
def overlaps(masks: Bool[Array, "L B lists R Sb"]) -> Float32[Array, "L-1 lists lists"]:
    """Share of the blocks of a list of layer l that the same row of a list of layer l - 1 holds, [l - 1, list, list before]."""
    after, before = (x.astype(jnp.float32) for x in (masks[1:], masks[:-1]))
    both = jnp.einsum("lbhrs,lbgrs->lhg", after, before, preferred_element_type=jnp.float32)
    return both / jnp.maximum(after.sum((1, 3, 4)), 1)[..., None]

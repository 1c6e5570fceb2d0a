"""The layers of a decoder, stacked and scanned, and what a layer tells a policy of prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seer_jax.draws import standard_normal
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.families import FAMILIES
from seer_jax.models.layers import BaseParam, Projections, layer_view, rms_norm, update_tokens
from seer_jax.models.rope import rotate
from seer_jax.selection.context import PrefillContext
from seer_jax.selection.policies import Dense, Policy, check_policy
from seer_jax.sharding.layout import Layout
from seer_jax.sharding.shard import Shard
from seer_jax.sharding.table import WEIGHTS


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is the one that the family names."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = BaseParam(jnp.ones(config.hidden_size, dtype))
        self.self_attn = Projections(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = BaseParam(jnp.ones(config.hidden_size, dtype))
        self.mlp = FAMILIES[config.family].mlp(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T E"], attend: Callable, shard: Shard | None = None
    ) -> tuple[Float[Array, "B T E"], Any]:
        """`attend(q, k, v) -> (output, aux)` gets queries and keys before RoPE; returns (x, aux)."""
        eps = self.config.rms_norm_eps
        with jax.named_scope("qkv"):
            projected = self.self_attn.qkv(rms_norm(x, self.input_layernorm[...], eps))
        with jax.named_scope("attention"):
            attended, aux = attend(*projected)

        def finish(x: Float[Array, "B n E"], attended: Float[Array, "B n H D"]) -> Float[Array, "B n E"]:
            x = x + summed(self.self_attn.out(attended))
            return x + summed(self.mlp(rms_norm(x, self.post_attention_layernorm[...], eps)))

        def summed(x: Float[Array, "B n E"]) -> Float[Array, "B n E"]:
            return x if shard is None else shard.sum_over_tensor(x)

        with jax.named_scope("mlp"):
            return update_tokens(finish, x, attended), aux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers that run alike, in one loop.

    Attributes:
      num_layers: how many.
      policy: which blocks their attention keeps; arrays that it holds have a value for each layer of the model.
    """

    num_layers: int = dataclasses.field(metadata=dict(static=True))
    policy: Policy = Dense()


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What an attention function may need of the layer that it works for.

    Attributes:
      index: of the layer.
      policy: of the layer.
      prefill_gate, decode_gate: the layer's slices of the gates.
    """

    index: Int[Array, ""]
    policy: Policy
    prefill_gate: PrefillGate | None
    decode_gate: DecodeGate | None


Attend = Callable[[LayerContext, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any, Any]]


class LayerStack(nnx.Module):
    """A decoder's weights and gates, and the passes over its layers; see `Transformer`.

    Every weight of `layers` and of the gates has a leading axis L.

    Attributes:
      prefill_gate, decode_gate: None, or gates of a `Transformer`.
      layout: how the model lies on a mesh of devices; None: it is not spread.
      shard: of the part of such a model that one device computes with, see `on_mesh`; None elsewhere.
    """

    layout: Layout | None = None
    shard: Shard | None = None

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        table = standard_normal(rngs.params(), (config.vocab_size, config.hidden_size)) * 0.02
        self.embed_tokens = BaseParam(table.astype(dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = BaseParam(jnp.ones(config.hidden_size, dtype))
        head = standard_normal(rngs.params(), table.shape) * 0.02
        self.lm_head = None if config.tie_word_embeddings else BaseParam(head.astype(dtype))
        self.prefill_gate: PrefillGate | None = nnx.data(None)
        self.decode_gate: DecodeGate | None = nnx.data(None)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the base weights, the hidden states and the cache."""
        return self.embed_tokens.dtype

    @property
    def head(self) -> BaseParam:
        """Output head, `[V, E]`: the embedding where the two are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def scan(
        self,
        tokens: Int[Array, "B T"],
        attend: Attend,
        state: Any = None,
        *,
        segments: Sequence[Segment] | None = None,
        remat: bool = False,
        in_place: bool = False,
    ) -> tuple[Float[Array, "B T E"], Any, Any]:
        """Runs all layers and the final norm.

        Args:
          tokens: `[B, T]`.
          attend: `attend(context, state, q, k, v) -> (output, state, aux)`, with q and k before RoPE.
          state: carried from layer to layer, for example a cache.
          segments: all layers of the model in order; None: one segment. Each has a loop of its own: in one loop the device would make
            the choice between two kinds in every layer, and on a GPU the host waits for such a choice.
          remat: keep nothing for a backward pass but what goes from layer to layer, and compute each layer anew there.
          in_place: read each layer's weights where they lie among those of all layers, without a copy; pays for few tokens.

        Returns:
          (hidden states after the final norm, state, aux of all layers stacked).
        """
        if self.layout is not None:
            raise NotImplementedError(
                "A model that is spread over a mesh must run its layers inside of `Transformer.spread`, each device its part; got another "
                "pass over its layers. Load the model without a mesh, or give the pass to model.spread."
            )
        segments = [s for s in segments or (Segment(self.config.num_layers),) if s.num_layers]
        # Weights that are gathered are copies, wherever they were read.
        in_place = in_place and (self.shard is None or not self.shard.gathers)
        every = (None if in_place else self.layers, self.prefill_gate, self.decode_gate)
        # Where a loop takes some of the layers, it finds them by their index: a slice of the stack would be a copy of their weights.
        sliced = not in_place and len(segments) == 1

        def run(carry: tuple, segment: Segment) -> tuple[tuple, Any]:
            def body(carry: tuple, scanned: Any) -> tuple[tuple, Any]:
                index, x, state = carry
                if not sliced:
                    scanned = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), every)
                layer, prefill_gate, decode_gate = scanned
                layer = layer_view(self.layers, index) if in_place else layer
                layer, x = (layer, x) if self.shard is None else self.shard.whole(layer, x)
                context = LayerContext(index, segment.policy.of_layer(index), prefill_gate, decode_gate)

                def hook(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
                    out, new_state, aux = attend(context, state, q, k, v)
                    return out, (new_state, aux)

                x, (state, aux) = layer(x, hook, self.shard)
                return (index + 1, x, state), aux

            # The loop itself keeps both computations of a layer apart.
            step = jax.checkpoint(body, prevent_cse=False) if remat else body
            return jax.lax.scan(step, carry, every if sliced else None, segment.num_layers)

        carry: tuple[jax.Array, jax.Array, Any] = (jnp.int32(0), self.embed(tokens), state)
        parts = []
        for segment in segments:
            carry, aux = run(carry, segment)
            parts.append(aux)
        (_, x, state), aux = carry, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), state, aux

    def segments(
        self, policy: Policy, gate: PrefillGate | DecodeGate | None, heads: int, phase: str = ""
    ) -> list[Segment]:
        """The layers under a policy: the first ones, which it leaves dense, and the others.

        Args:
          policy: of the whole model.
          gate: of the phase that the policy is for.
          heads: that the policy may hold values for: H while prompts are read, K while tokens are decoded.
          phase: "prefill" or "decode"; "": either.

        Raises:
          ValueError: it is no policy, or does not fit the model.
        """
        check_policy("sparsity", policy)
        num_layers = self.config.num_layers
        policy.check(num_layers, gate, phase)
        dense = policy.dense_first_layers(gate)
        return [Segment(dense), Segment(num_layers - dense, policy.stacked(num_layers, heads))]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Hidden states before the first layer."""
        table = self.embed_tokens[...]
        return table[tokens] if self.shard is None else self.shard.embed(table, tokens)

    def logits(self, hidden: Float[Array, "*b E"]) -> Float[Array, "*b V"]:
        """Output head, float32; a device's part of a model gives those of its part of the vocabulary."""
        head, hidden = self.whole_head(hidden)
        return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)

    def whole_head(self, hidden: Float[Array, "*b E"]) -> tuple[Float[Array, "V E"], Float[Array, "*b E"]]:
        """(output head, hidden states that it is for), the former gathered over fsdp; in a device's part of a model that of its part of the
        vocabulary."""
        head = self.head[...]
        if self.shard is None or not self.shard.gathers:
            return head, hidden
        head, hidden = self.shard.after(head, hidden)
        return self.shard.gathered(head, WEIGHTS["lm_head"]), hidden

    def prefill_context(
        self,
        layer: LayerContext,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
    ) -> PrefillContext:
        """What a policy may look at while a layer reads whole prompts; q and k before RoPE.

        Keys and values of padding are zeros: what a damaged or overflowing padding token leaves there must reach no other token.
        """
        k, v = _without_padding(k, v, jnp.arange(k.shape[1]), lengths)
        q_rotated, k_rotated = rotate(q, k, jnp.arange(q.shape[1])[None], self.config.rope)
        return PrefillContext(
            q=q,
            k=k,
            q_rotated=q_rotated,
            k_rotated=k_rotated,
            v=v,
            lengths=lengths,
            layer=layer.index,
            block_size=layer.policy.tokens_per_block(layer.prefill_gate),
            gate=layer.prefill_gate,
            shard=self.shard,
        )

    def chunk_context(
        self,
        layer: LayerContext,
        cache: Cache,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
        offset: Int[Array, ""],
        row: Int[Array, ""] | None = None,
    ) -> tuple[PrefillContext, Cache]:
        """As `prefill_context`, while a layer reads a chunk of prompts from position `offset` on, and the cache with the chunk's keys.

        Args:
          lengths: of the whole prompts.
          row: of the cache, where that has more rows than the one prompt; None: those of the prompts.
        """
        first_row = 0 if row is None else row
        positions = offset + jnp.arange(k.shape[1])
        k, v = _without_padding(k, v, positions, lengths)
        q_rotated, k_rotated = rotate(q, k, positions[None], self.config.rope)
        cache = cache.fill(layer.index, k_rotated, v, start=offset, row=first_row)
        gate, block_size = layer.prefill_gate, layer.policy.tokens_per_block(layer.prefill_gate)
        if gate is not None and cache.prefill_gate_keys is not None:
            valid = positions[None] < lengths[:, None]
            keys, first = gate.keys(k, positions[None], valid), offset // gate.config.key_pool
            cache = cache.append_prefill_gate_keys(layer.index, keys, first_key=first, row=first_row)
        if layer.decode_gate is not None:
            cache = cache.fill_decode_gate(layer.index, layer.decode_gate, k, lengths, start=offset, row=first_row)
        view = cache.view(layer.index, row)
        context = PrefillContext(
            q=q,
            k=None,
            q_rotated=q_rotated,
            k_rotated=view.keys,
            v=view.values,
            lengths=jnp.minimum(lengths, offset + k.shape[1]),
            prompt_lengths=lengths,
            layer=layer.index,
            block_size=block_size,
            offset=offset,
            gate=gate,
            gate_keys=view.prefill_gate_keys,
            cached=view.in_place,
            shard=self.shard,
        )
        return context, cache


def _without_padding(
    k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], positions: Int[Array, "T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Keys and values, zeros behind the end of each row."""
    inside = (positions[None] < lengths[:, None])[..., None, None]
    return jnp.where(inside, k, jnp.zeros_like(k)), jnp.where(inside, v, jnp.zeros_like(v))

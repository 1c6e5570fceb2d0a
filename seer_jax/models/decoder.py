"""The decoder: one module for all families, its layers stacked and scanned."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from seer_jax.gates.configs import DecodeGateConfig, GateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.make import make_gate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.attention import decode_attention, prefill_attention
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.families import FAMILIES
from seer_jax.models.layers import BaseParam, Projections, layer_view, rms_norm, update_tokens
from seer_jax.models.rope import rotate, same_rope
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.policies import Dense, Policy, check_policy
from seer_jax.sharding.layout import Layout
from seer_jax.sharding.on_mesh import OF_LAYERS_AND_ROWS, OF_ROWS, OF_VOCABULARY, Results, make_cache, on_mesh
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


class Transformer(nnx.Module):
    """A causal language model whose attention can be sparse.

    Every weight of `layers` and of the gates has a leading axis L. The module is a pytree: pass it through `jax.jit` as an
    argument, never as a closure, which would make its weights constants of the program.

    Attributes:
      prefill_gate, decode_gate: None, or gates that `attach` set. A model can carry both.
      layout: how the model lies on a mesh of devices; None: it is not spread.
      shard: of the part of such a model that one device computes with, see `on_mesh`; None elsewhere.
    """

    layout: Layout | None = None
    shard: Shard | None = None

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32) * 0.02
        self.embed_tokens = BaseParam(table.astype(dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = BaseParam(jnp.ones(config.hidden_size, dtype))
        head = jax.random.normal(rngs.params(), table.shape, jnp.float32) * 0.02
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

    def attach(self, *gates: PrefillGate | DecodeGate) -> "Transformer":
        """Sets one or both gates; each must have been made for a model of this shape.

        Raises:
          ValueError: a gate is none, or layers, heads or head dim of its model differ from this one's.
        """
        for gate in gates:
            if not isinstance(gate, PrefillGate | DecodeGate):
                raise ValueError(
                    f"A gate must be a PrefillGate or a DecodeGate; got {gate!r}. Load one: seer_jax.convert.load_gates(folder, config)."
                )
            for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope"):
                ours, theirs = getattr(self.config, name), getattr(gate.model, name)
                if ours != theirs and not (name == "rope" and same_rope(ours, theirs, self.config.head_dim)):
                    raise ValueError(
                        f"A gate must fit the model it is attached to: {name} must be {ours}; got {theirs}. "
                        "Load the gates that were trained for this base model."
                    )
            if isinstance(gate, PrefillGate):
                self.prefill_gate = gate
            else:
                self.decode_gate = gate
        return self

    def add_gate(self, config: GateConfig, *, rngs: nnx.Rngs) -> "Transformer":
        """Attaches a fresh, untrained gate."""
        return self.attach(make_gate(config, self.config, rngs=rngs))

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
                "A model that is spread over a mesh reads and decodes tokens, and does nothing else yet; got another pass over its "
                "layers. Load the model without a mesh."
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
                layer = layer if self.shard is None else self.shard.whole(layer)
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
        head = self.head[...]
        if self.shard is not None:
            head = self.shard.gathered(head, WEIGHTS["lm_head"])
        return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)

    def hidden_states(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B T E"], Float[Array, "L B"]]:
        """Hidden states after the final norm, and the share of causal blocks that each layer and row kept."""
        tokens, lengths = self.check(tokens, lengths)
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        return self.spread(_read, (OF_ROWS, OF_LAYERS_AND_ROWS), segments, tokens, lengths)

    def spread(self, function: Callable[..., Any], results: Results, segments: Sequence[Segment], *args: Any) -> Any:
        """function(model, segments, *args): of this model, or where it lies on a mesh of each device's part of it, see `on_mesh`."""
        if self.layout is None:
            return function(self, segments, *args)
        return on_mesh(function, results, self, segments, *args)

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
        inside = (jnp.arange(k.shape[1])[None] < lengths[:, None])[..., None, None]
        k, v = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (k, v))
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

    def __call__(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None, *, sparsity: Policy = Dense()
    ) -> Float[Array, "B T V"]:
        """Logits of every position.

        Args:
          tokens: right-padded, in [0, vocab_size).
          lengths: tokens of each row that count, in [1, T]; None: all. Logits after them are finite and mean nothing.
          sparsity: which key blocks the attention keeps.

        Returns:
          float32.

        Raises:
          ValueError: shapes, dtypes, tokens or lengths are wrong, the policy needs a gate that the model has not, or leaves none of
            its layers sparse.
        """
        tokens, lengths = self.check(tokens, lengths)
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        return self.spread(_read_logits, (OF_VOCABULARY,), segments, tokens, lengths)[0]

    def prefill(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        lengths: Int[Array | np.ndarray, "B"] | None,
        cache: Cache,
        *,
        sparsity: Policy = Dense(),
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Reads prompts into an empty cache; returns the logits after each row's last token and the share of causal blocks each
        layer kept.

        Args:
          tokens, lengths, sparsity: as in `__call__`.
          cache: of at least T tokens; what it held is lost.
        """
        tokens, lengths = self.check(tokens, lengths)
        if tokens.shape[1] > cache.capacity:
            raise ValueError(
                f"A prompt must fit the cache: got {tokens.shape[1]} tokens for {cache.capacity} slots. Make a larger cache."
            )
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        return self.spread(_fill, (OF_ROWS, Cache, OF_LAYERS_AND_ROWS), segments, tokens, lengths, cache)

    def decode(
        self, tokens: Int[Array, "B"], cache: Cache, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Appends one token to each row; returns the logits after it and the share of blocks each layer kept.

        The cache must have a free slot in every row (`generate` sees to that); an append beyond it would be lost.
        """
        segments = self.segments(sparsity, self.decode_gate, self.config.num_kv_heads, "decode")
        return self.spread(_append, (OF_ROWS, Cache, OF_LAYERS_AND_ROWS), segments, tokens, cache)

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache that fits this model and its decode gate."""
        gate = None if self.decode_gate is None else self.decode_gate.config
        return self.empty_cache(batch, capacity, gate)

    def empty_cache(self, batch: int, capacity: int, decode_gate: DecodeGateConfig | None) -> Cache:
        """A cache that fits this model, where its weights are; `decode_gate` as in `Cache.create`."""
        create = Cache.create if self.layout is None else functools.partial(make_cache, self.layout)
        return create(self.config, batch, capacity, self.dtype, decode_gate=decode_gate)

    def check(
        self, tokens: Int[Array | np.ndarray, "B T"], lengths: Int[Array | np.ndarray, "B"] | None
    ) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Checks tokens and lengths (their values where they are concrete) and returns them as arrays."""
        try:
            ids = _concrete(tokens)
        except ValueError:
            raise ValueError(
                "tokens must be one integer array [B, T]; got rows of different lengths. "
                "Pad them first: tokens, lengths = pad_prompts(rows)."
            ) from None
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or 0 in ids.shape:
            raise ValueError(f"tokens must be integers [B, T] with B, T >= 1; got {ids.dtype} {ids.shape}.")
        (batch, width), array = ids.shape, tokens if isinstance(tokens, jax.Array) else jnp.asarray(ids)
        if isinstance(ids, np.ndarray) and not (ids.min() >= 0 and ids.max() < self.config.vocab_size):
            raise ValueError(
                f"Tokens must lie in [0, {self.config.vocab_size}), the model's vocabulary; got {ids.min()} .. {ids.max()}. "
                "Use the tokenizer that belongs to the model."
            )
        if lengths is None:
            return array, jnp.full(batch, width, jnp.int32)
        counts = _concrete(lengths)
        if counts.shape != (batch,) or not jnp.issubdtype(counts.dtype, jnp.integer):
            raise ValueError(f"lengths must be integers [B] with B = {batch}; got {counts.dtype} {counts.shape}.")
        if isinstance(counts, np.ndarray) and not (counts.min() >= 1 and counts.max() <= width):
            raise ValueError(
                f"Each row must have 1 to T = {width} tokens (no empty prompt); got lengths {counts.min()} .. {counts.max()}."
            )
        return array, jnp.asarray(counts, jnp.int32)


def _read(
    model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T E"], Float[Array, "L B"]]:
    """See `Transformer.hidden_states`."""

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, lengths)
        out, kept = prefill_attention(layer.policy, context)
        return out, state, kept

    hidden, _, kept = model.scan(tokens, attend, segments=segments)
    return hidden, _of_all_heads(model, kept)


def _read_logits(
    model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T V"]]:
    """See `Transformer.__call__`."""
    hidden, _ = _read(model, segments, tokens, lengths)
    return (model.logits(hidden),)


def _fill(
    model: Transformer,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
    """See `Transformer.prefill`."""

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, lengths)
        out, kept = prefill_attention(layer.policy, context)
        cache = cache.fill(layer.index, context.k_rotated, context.v)
        if layer.decode_gate is not None:
            cache = cache.fill_decode_gate(layer.index, layer.decode_gate, context.k, lengths)
        return out, cache, kept

    hidden, cache, kept = model.scan(tokens, attend, cache, segments=segments)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _next_logits(model, last), cache.with_lengths(lengths), _of_all_heads(model, kept)


def _append(
    model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
    """See `Transformer.decode`."""
    shard = model.shard

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        # A list is chosen by all query heads of a group: devices that share the group's keys attend with all of them.
        q = q if shard is None else shard.group(q)
        q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], model.config.rope)
        cache = cache.append(layer.index, k_rotated[:, 0], v[:, 0])
        context = DecodeContext(
            q=q,
            q_rotated=q_rotated,
            cache=cache.view(layer.index),
            layer=layer.index,
            block_size=layer.policy.tokens_per_block(layer.decode_gate),
            gate=layer.decode_gate,
            shard=shard,
        )
        out, kept = decode_attention(layer.policy, context)
        return out if shard is None else shard.own_heads(out), cache, (kept, k[:, 0])

    hidden, cache, aux = model.scan(tokens[:, None], attend, cache, segments=segments, in_place=True)
    kept, keys = aux
    return _next_logits(model, hidden[:, 0]), cache.finish_step(model.decode_gate, keys), _of_all_heads(model, kept)


def _next_logits(model: Transformer, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Logits of the whole vocabulary."""
    logits = model.logits(hidden)
    return logits if model.shard is None else model.shard.whole_vocabulary(logits)


def _of_all_heads(model: Transformer, kept: Float[Array, "L B"]) -> Float[Array, "L B"]:
    """Shares of blocks that all heads kept, from those of the heads that a device has."""
    return kept if model.shard is None else model.shard.mean_over_tensor(kept)


def _concrete(x: ArrayLike) -> Tracer | np.ndarray:
    """The values where they are known, so that they can be checked; a tracer as it is."""
    return x if isinstance(x, Tracer) else np.asarray(x)


def check_model(model: Any) -> None:
    """Raises ValueError where what is given as a model is none."""
    if not isinstance(model, Transformer):
        got = repr(model) if model is None or isinstance(model, str | int | float) else type(model).__name__
        raise ValueError(
            f"model must be a Transformer; got {got}. Load one: seer_jax.from_pretrained(folder or hub id)."
        )

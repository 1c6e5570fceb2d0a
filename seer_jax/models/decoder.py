"""The decoder: one module for the Llama, Qwen2 and Qwen3 families, its layers stacked and scanned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from seer_jax.models.attention import decode_attention, prefill_attention
from seer_jax.models.rope import rotate
from seer_jax.models.cache import Cache
from seer_jax.gates.configs import GateConfig
from seer_jax.models.config import ModelConfig
from seer_jax.gates.gate import DecodeGate, PrefillGate, make_gate
from seer_jax.models.layers import BaseParam, Layer, MLP, Projections, of_layer, rms_norm, update_tokens
from seer_jax.selection.policies import Dense, Policy, RankingPolicy, ranks_by_gate


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = BaseParam(jnp.ones(config.hidden_size, dtype))
        self.self_attn = Projections(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = BaseParam(jnp.ones(config.hidden_size, dtype))
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T E"], attend: Callable, layer: Layer = None
    ) -> tuple[Float[Array, "B T E"], Any]:
        """`attend(q, k, v) -> (output, aux)` gets queries and keys before RoPE; returns (x, aux)."""
        eps = self.config.rms_norm_eps
        normed = rms_norm(x, of_layer(self.input_layernorm, layer), eps)
        attended, aux = attend(*self.self_attn.qkv(normed, layer))

        def finish(x: Float[Array, "B n E"], attended: Float[Array, "B n H D"]) -> Float[Array, "B n E"]:
            x = x + self.self_attn.out(attended, layer)
            return x + self.mlp(rms_norm(x, of_layer(self.post_attention_layernorm, layer), eps), layer)

        return update_tokens(finish, x, attended), aux


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What an attention function may need of the layer that it works for: its index and its slice of the gates.

    Attributes:
      dense: whether it is one of the first layers that are to keep every block.
    """

    index: Int[Array, ""]
    prefill_gate: PrefillGate | None
    decode_gate: DecodeGate | None
    dense: bool


Attend = Callable[[LayerContext, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any, Any]]


class Transformer(nnx.Module):
    """A causal language model whose attention can be sparse.

    Every weight of `layers` and of the gates has a leading axis L. The module is a pytree: pass it through `jax.jit` as an
    argument, never as a closure, which would make its weights constants of the program.

    Attributes:
      prefill_gate, decode_gate: None, or gates that `attach` set. A model can carry both.
    """

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
        """Of the base weights, and so of hidden states and cache."""
        return self.embed_tokens.dtype

    @property
    def head(self) -> BaseParam:
        """Of the output, `[V, E]`: the embedding where the two are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def attach(self, *gates: PrefillGate | DecodeGate) -> "Transformer":
        """Sets one or both gates; each must have been made for a model of this shape.

        Raises:
          ValueError: layers, heads or head dim of a gate's model differ from this one's.
        """
        for gate in gates:
            for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope"):
                ours, theirs = getattr(self.config, name), getattr(gate.model, name)
                if ours != theirs:
                    raise ValueError(
                        f"A gate fits a model of the shape it was made for: expected {name}={ours}, got {theirs}. "
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
        dense_layers: int = 0,
        remat: bool = False,
        stacked: bool = False,
    ) -> tuple[Float[Array, "B T E"], Any, Any]:
        """Runs all layers and the final norm.

        Args:
          tokens: `[B, T]`.
          attend: `attend(context, state, q, k, v) -> (output, state, aux)`, with q and k before RoPE.
          state: carried from layer to layer, for example a cache.
          dense_layers: the first layers, in [0, L], whose `context.dense` is set. They run in a loop of their own: in one loop
            the choice would be made on the device in every layer, and on a GPU the host waits for such a choice.
          stacked: read each layer's weights where they lie among those of all layers, without a copy; pays for few tokens.
          remat: keep nothing for a backward pass but what goes from layer to layer, and compute each layer anew there.

        Returns:
          (hidden states after the final norm, state, aux of all layers stacked).
        """

        every = (None if stacked else self.layers, self.prefill_gate, self.decode_gate)

        def run(carry: tuple, length: int, *, dense: bool, sliced: bool) -> tuple[tuple, Any]:
            def body(carry: tuple, scanned: Any) -> tuple[tuple, Any]:
                index, x, state = carry
                if not sliced:
                    scanned = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), every)
                layers, prefill_gate, decode_gate = scanned
                context = LayerContext(index, prefill_gate, decode_gate, dense)

                def hook(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
                    out, new_state, aux = attend(context, state, q, k, v)
                    return out, (new_state, aux)

                x, (state, aux) = self.layers(x, hook, index) if stacked else layers(x, hook)
                return (index + 1, x, state), aux

            # The loop itself keeps both computations of a layer apart.
            step = jax.checkpoint(body, prevent_cse=False) if remat else body
            return jax.lax.scan(step, carry, every if sliced else None, length)

        carry: tuple[jax.Array, jax.Array, Any] = (jnp.int32(0), self.embed_tokens[...][tokens], state)
        sparse_layers = self.config.num_layers - dense_layers
        # Some of the layers are found by their index: a slice of the stack would be a copy of their weights.
        sliced = not stacked and min(dense_layers, sparse_layers) == 0
        parts = []
        for length, dense in ((dense_layers, True), (sparse_layers, False)):
            if length:
                carry, aux = run(carry, length, dense=dense, sliced=sliced)
                parts.append(aux)
        (_, x, state), aux = carry, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), state, aux

    def logits(self, hidden: Float[Array, "*b E"]) -> Float[Array, "*b V"]:
        """Output head, float32."""
        return jnp.einsum("...e,ve->...v", hidden, self.head[...], preferred_element_type=jnp.float32)

    def hidden_states(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B T E"], Float[Array, "L B"]]:
        """Hidden states after the final norm, and the share of causal blocks that each layer and row kept."""
        lengths = self.check(tokens, lengths)
        self.check_policy(sparsity, self.prefill_gate)

        def attend(context: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            policy, gate = Dense() if context.dense else sparsity, context.prefill_gate
            out, _, kept = prefill_attention(policy, gate, context.index, q, k, v, lengths, self.config)
            return out, state, kept

        hidden, _, kept = self.scan(tokens, attend, dense_layers=_dense_layers(sparsity, self.prefill_gate))
        return hidden, kept

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
        hidden, _ = self.hidden_states(tokens, lengths, sparsity=sparsity)
        return self.logits(hidden)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None, cache: Cache, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Reads prompts into an empty cache; returns the logits after each row's last token and the share of causal blocks each
        layer kept.

        Args:
          tokens, lengths, sparsity: as in `__call__`.
          cache: of at least T tokens; what it held is lost.
        """
        lengths = self.check(tokens, lengths)
        self.check_policy(sparsity, self.prefill_gate)
        if tokens.shape[1] > cache.capacity:
            raise ValueError(
                f"A prompt must fit the cache: got {tokens.shape[1]} tokens for {cache.capacity} slots. Make a larger cache."
            )

        def attend(context: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            policy, gate, index = Dense() if context.dense else sparsity, context.prefill_gate, context.index
            out, k_rotated, kept = prefill_attention(policy, gate, index, q, k, v, lengths, self.config)
            cache = cache.fill(index, k_rotated, v)
            if context.decode_gate is not None:
                cache = cache.fill_gate(index, context.decode_gate, k, lengths)
            return out, cache, kept

        hidden, cache, kept = self.scan(tokens, attend, cache, dense_layers=_dense_layers(sparsity, self.prefill_gate))
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(last), dataclasses.replace(cache, lengths=lengths), kept

    def decode(
        self, tokens: Int[Array, "B"], cache: Cache, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Appends one token to each row; returns the logits after it and the share of blocks each layer kept.

        The cache must have a free slot in every row (`generate` sees to that); an append beyond it would be lost.
        """
        self.check_policy(sparsity, self.decode_gate)
        position = cache.lengths

        def attend(context: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            policy, gate, index = Dense() if context.dense else sparsity, context.decode_gate, context.index
            q_rotated, k_rotated = rotate(q, k, position[:, None], self.config)
            cache = cache.append(index, k_rotated[:, 0], v[:, 0])
            out, kept = decode_attention(policy, gate, index, q, q_rotated, cache)
            return out, cache, (kept, k[:, 0])

        first = _dense_layers(sparsity, self.decode_gate)
        hidden, cache, aux = self.scan(tokens[:, None], attend, cache, dense_layers=first, stacked=True)
        kept, keys = aux
        if self.decode_gate is not None:
            cache = cache.append_gate(self.decode_gate, keys)
        return self.logits(hidden[:, 0]), dataclasses.replace(cache, lengths=position + 1), kept

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache that fits this model and its decode gate."""
        gate = None if self.decode_gate is None else self.decode_gate.config
        return Cache.create(self.config, batch, capacity, self.dtype, gate)

    def check(self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None) -> Int[Array, "B"]:
        """Checks tokens and lengths (their values where they are concrete) and returns the lengths."""
        ids = _concrete(tokens)
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or 0 in ids.shape:
            raise ValueError(f"tokens are integers [B, T] with B, T >= 1; got {ids.dtype} {ids.shape}.")
        batch, width = ids.shape
        if isinstance(ids, np.ndarray) and not (ids.min() >= 0 and ids.max() < self.config.vocab_size):
            raise ValueError(
                f"Tokens lie in [0, {self.config.vocab_size}), the model's vocabulary; got {ids.min()} .. {ids.max()}. "
                "Use the tokenizer that belongs to the model."
            )
        if lengths is None:
            return jnp.full(batch, width, jnp.int32)
        counts = _concrete(lengths)
        if counts.shape != (batch,) or not jnp.issubdtype(counts.dtype, jnp.integer):
            raise ValueError(f"lengths are integers [B] with B = {batch}; got {counts.dtype} {counts.shape}.")
        if isinstance(counts, np.ndarray) and not (counts.min() >= 1 and counts.max() <= width):
            raise ValueError(
                f"Each row has 1 to T = {width} tokens (no empty prompt); got lengths {counts.min()} .. {counts.max()}."
            )
        return jnp.asarray(counts, jnp.int32)

    def check_policy(self, policy: Policy, gate: PrefillGate | DecodeGate | None) -> None:
        """Refuses a policy that ranks by a gate which the model does not have, or that leaves none of its layers sparse."""
        if ranks_by_gate(policy) and gate is None:
            raise ValueError(
                f"{policy} ranks blocks by a learned gate, but the model has none of this kind; "
                "load one (from_pretrained(..., gates=...)), train one, or use Dense()."
            )
        if isinstance(policy, RankingPolicy) and policy.dense_layers >= self.config.num_layers:
            raise ValueError(
                f"dense_layers must leave a sparse layer: below {self.config.num_layers}, the model's layers; got "
                f"{policy.dense_layers}. Lower it, or use Dense()."
            )


def _dense_layers(policy: Policy, gate: PrefillGate | DecodeGate | None) -> int:
    """How many of the first layers keep every block although the policy is sparse: 0 where it is `Dense`."""
    if isinstance(policy, Dense):
        return 0
    start = gate.config.start_layer if isinstance(gate, DecodeGate) else 0
    return max(start, policy.dense_layers if isinstance(policy, RankingPolicy) else 0)


def _concrete(x: ArrayLike) -> Tracer | np.ndarray:
    """The values where they are known, so that they can be checked; a tracer as it is."""
    return x if isinstance(x, Tracer) else np.asarray(x)

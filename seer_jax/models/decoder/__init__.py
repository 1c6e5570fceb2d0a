"""The decoder: one module for all families, its layers stacked and scanned."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from seer_jax.checks import whole_number
from seer_jax.gates.configs import DecodeGateConfig, GateConfig, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.make import make_gate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder.passes import append, fill, fill_in_chunks, fill_row, read_layers, read_logits
from seer_jax.models.decoder.stack import LayerStack, Segment
from seer_jax.models.rope import same_rope
from seer_jax.selection.policies import Dense, Lists, Policy
from seer_jax.sharding.on_mesh import (
    OF_LAYERS_AND_ROWS,
    OF_ROWS,
    OF_VOCABULARY,
    Results,
    Split,
    make_cache,
    on_mesh,
    unwrapped,
)


class Transformer(LayerStack):
    """A causal language model whose attention can be sparse.

    Every weight of `layers` and of the gates has a leading axis L. The module is a pytree: pass it through `jax.jit` as an
    argument, never as a closure, which would make its weights constants of the program.

    Attributes:
      prefill_gate, decode_gate: None, or gates that `attach` set. A model can carry both.
      layout: how the model lies on a mesh of devices; None: it is not spread.
    """

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

    def use_rope(self, config: ModelConfig) -> "Transformer":
        """Takes RoPE and context of another configuration, such as `self.config.with_yarn(4)`, for queries, keys and gates."""
        changes: dict[str, Any] = dict(rope=config.rope, max_position_embeddings=config.max_position_embeddings)
        self.config = dataclasses.replace(self.config, **changes)
        for gate in (self.prefill_gate, self.decode_gate):
            if gate is not None:
                gate.model = dataclasses.replace(gate.model, **changes)
        return self

    def hidden_states(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None, *, sparsity: Policy = Dense()
    ) -> tuple[Float[Array, "B T E"], Float[Array, "L B"]]:
        """Hidden states after the final norm, and the share of causal blocks that each layer and row kept."""
        tokens, lengths = self.check(tokens, lengths)
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        return self.spread(read_layers, (OF_ROWS, OF_LAYERS_AND_ROWS), segments, tokens, lengths)

    def spread(self, function: Callable[..., Any], results: Results, segments: Sequence[Segment], *args: Any) -> Any:
        """function(model, segments, *args): of this model, or where it lies on a mesh of each device's part of it, see `on_mesh`."""
        if self.layout is None:
            return function(self, segments, *map(unwrapped, args))
        return on_mesh(function, results, self, segments, *args)

    def everywhere(self, tree: Any) -> Any:
        """A pytree of traced results that every device, and so every host, has whole: for what the host reads."""
        return tree if self.layout is None else self.layout.replicated(tree)

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
        return self.spread(read_logits, (OF_VOCABULARY,), segments, tokens, lengths)[0]

    def prefill(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        lengths: Int[Array | np.ndarray, "B"] | None,
        cache: Cache,
        *,
        sparsity: Policy = Dense(),
        chunk: int | None = None,
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Reads prompts into an empty cache; returns the logits after each row's last token and the share of causal blocks each
        layer kept.

        In chunks, each part of the prompts attends to what the cache has of the parts before it. Results are those of whole prompts:
        what a policy asks of the prompt's length (`TopK`, `dense_last_rows`) is asked of the whole prompt, whose length is known from
        the start. Besides the cache, a chunk takes as much memory whatever the length of the prompt; the loop over chunks ends with the
        longest prompt, so that one program serves prompts of every length up to T.

        Args:
          tokens, lengths, sparsity: as in `__call__`.
          cache: of at least T tokens, in chunks T rounded up to whole chunks; what it held is lost.
          chunk: tokens that are read at a time, a multiple of the block sizes of the policy and of the gates that are used; None: all.

        Raises:
          ValueError: as in `__call__`, the cache is too small, the chunk is no multiple of the block sizes, or the policy looks at the
            whole prompt (`Policy.check_chunks`).
        """
        if chunk is not None:
            return self.extend(tokens, lengths, cache, start=0, sparsity=sparsity, chunk=chunk)
        tokens, lengths = self.check(tokens, lengths)
        _check_room(tokens.shape[1], None, cache)
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        return self.spread(fill, (OF_ROWS, Cache, OF_LAYERS_AND_ROWS), segments, tokens, lengths, cache)

    def extend(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        lengths: Int[Array | np.ndarray, "B"] | None,
        cache: Cache,
        *,
        start: int | Int[Array | np.ndarray, ""],
        sparsity: Policy = Dense(),
        chunk: int,
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """As `prefill` in chunks, behind the first `start` tokens of each row, of which the cache has keys and values; what it holds
        behind them is lost.

        What was read stays as it was read: the rules that ask for the length of the prompt (`TopK`, `dense_last_rows`) ask the rows
        that are read now for that of the whole, `start` included.

        Args:
          tokens: from position `start` on, right-padded.
          lengths: of these tokens in each row, in [1, T]; None: all.
          cache: with room for `start` tokens and T rounded up to whole chunks. Where the policy ranks by the prefill gate it must keep the gate's keys
            (`empty_cache`), unless `start` is 0.
          start: the same for all rows, a multiple of the block sizes; may be traced, as all of it may.
          sparsity, chunk: see `prefill`.
        """
        tokens, lengths = self.check(tokens, lengths)
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        keeps_keys = cache.decode_gate is not None
        self.check_chunk(chunk, sparsity, keeps_decode_keys=keeps_keys)
        width = -(-tokens.shape[1] // chunk) * chunk
        first = _concrete(start)
        if isinstance(first, np.ndarray):
            multiple = self.whole_blocks(sparsity, keeps_decode_keys=keeps_keys)
            if first.ndim or not np.issubdtype(first.dtype, np.integer) or first < 0 or first % multiple:
                raise ValueError(
                    f"start must be a multiple of {multiple} tokens, whole blocks, from 0 on; got {start}."
                )
            _check_room(int(first) + width, chunk, cache)
        else:
            _check_room(width, chunk, cache)
        follows = not isinstance(first, np.ndarray) or first > 0
        if follows and sparsity.needs_gate and cache.prefill_gate_keys is None:
            raise ValueError(
                f"A cache that is extended under {sparsity} must keep the prefill gate's keys of what was read; got none. "
                "Make it by model.empty_cache(batch, capacity, decode_gate, model.prefill_gate.config)."
            )
        results = OF_ROWS, Cache, OF_LAYERS_AND_ROWS
        heads = tuple(sorted({1, self.config.num_kv_heads, self.config.num_heads}))
        lists = Lists(tokens.shape[0], heads, tokens.shape[1], per_row=True)
        segments = [dataclasses.replace(s, policy=s.policy.padded(lists, cache.capacity)) for s in segments]
        chunks = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))).reshape(len(tokens), -1, chunk)
        # The same on all devices of a mesh, whose rows differ: they exchange weights in each chunk.
        count = Split((jnp.asarray(start, jnp.int32), -(-lengths.max() // chunk)), PartitionSpec())
        return self.spread(fill_in_chunks, results, segments, chunks, lengths, cache, count)

    def check_chunk(self, chunk: int, policy: Policy, *, keeps_decode_keys: bool) -> None:
        """Checks that prompts can be read in chunks of so many tokens under a policy; see `prefill`.

        Args:
          chunk: tokens.
          policy: of the prompts.
          keeps_decode_keys: whether the cache keeps keys of the decode gate.
        """
        whole_number("prefill_chunk", chunk)
        policy.check_chunks()
        if chunk % (multiple := self.whole_blocks(policy, keeps_decode_keys=keeps_decode_keys)):
            raise ValueError(
                f"prefill_chunk must be a multiple of {multiple} tokens, whole blocks; got {chunk}. Use {-(-chunk // multiple) * multiple}."
            )

    def whole_blocks(self, policy: Policy, *, keeps_decode_keys: bool) -> int:
        """Tokens that are whole blocks of the policy and of the gates."""
        sizes = [policy.tokens_per_block(self.prefill_gate)]
        if self.prefill_gate is not None:
            sizes.append(self.prefill_gate.config.block_size)
        if keeps_decode_keys and self.decode_gate is not None:
            sizes.append(self.decode_gate.config.block_size)
        return math.lcm(*sizes)

    def prefill_row(
        self,
        tokens: Int[Array, "1 T"],
        length: Int[Array, "1"],
        cache: Cache,
        *,
        row: Int[Array, ""],
        start: Int[Array, ""],
        sparsity: Policy = Dense(),
    ) -> tuple[Float[Array, "1 V"], Cache]:
        """Reads one chunk of a prompt into one row of a cache; the other rows, and all lengths, stay as they are.

        Args:
          tokens: of the chunk, right-padded; a whole number of blocks (`check_chunk`).
          length: of the whole prompt.
          cache: with the row's first `start` tokens, and room for the chunk; with the gates' keys where the policies need them.
          row: below the cache's rows.
          start: position of the chunk, a multiple of its size.
          sparsity: as in `prefill`.

        Returns:
          (logits after the prompt's last token, where that is in the chunk, otherwise of no meaning; cache).
        """
        segments = self.segments(sparsity, self.prefill_gate, self.config.num_heads, "prefill")
        place = Split((row, start), PartitionSpec())
        return self.spread(fill_row, (OF_ROWS, Cache), segments, tokens, length, cache, place)

    def decode(
        self,
        tokens: Int[Array, "B"],
        cache: Cache,
        *,
        sparsity: Policy = Dense(),
        active: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache, Float[Array, "L B"]]:
        """Appends one token to each row; returns the logits after it and the share of blocks each layer kept.

        The cache must have a free slot in every row (`generate` sees to that); an append beyond it would be lost.

        Args:
          tokens: one of each row.
          cache: what they follow.
          sparsity: which cached blocks they attend to.
          active: rows that are appended to; the others stay as they are, and their results mean nothing. None: all.
        """
        segments = self.segments(sparsity, self.decode_gate, self.config.num_kv_heads, "decode")
        return self.spread(append, (OF_ROWS, Cache, OF_LAYERS_AND_ROWS), segments, tokens, cache, active)

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache that fits this model and its decode gate."""
        gate = None if self.decode_gate is None else self.decode_gate.config
        return self.empty_cache(batch, capacity, gate)

    def empty_cache(
        self,
        batch: int,
        capacity: int,
        decode_gate: DecodeGateConfig | None,
        prefill_gate: PrefillGateConfig | None = None,
    ) -> Cache:
        """A cache that fits this model, where its weights are; the gates as in `Cache.create`."""
        create = Cache.create if self.layout is None else functools.partial(make_cache, self.layout)
        return create(self.config, batch, capacity, self.dtype, decode_gate=decode_gate, prefill_gate=prefill_gate)

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


def check_model(model: Any) -> None:
    """Raises ValueError where what is given as a model is none."""
    if not isinstance(model, Transformer):
        got = repr(model) if model is None or isinstance(model, str | int | float) else type(model).__name__
        raise ValueError(
            f"model must be a Transformer; got {got}. Load one: seer_jax.from_pretrained(folder or hub id)."
        )


def check_weights(model: Transformer) -> None:
    """Raises ValueError where a model has shapes in place of weights."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model)):
        raise ValueError("model must have weights to generate; got one of shapes alone. Load it without abstract=True.")


def _check_room(tokens: int, chunk: int | None, cache: Cache) -> None:
    """Raises ValueError where a prompt does not fit the cache."""
    if tokens > cache.capacity:
        rounded = "" if chunk is None else f" (in whole chunks of {chunk})"
        raise ValueError(
            f"A prompt must fit the cache: got {tokens} tokens{rounded} for {cache.capacity} slots. Make a larger cache."
        )


def _concrete(x: ArrayLike) -> Tracer | np.ndarray:
    """The values where they are known, so that they can be checked; a tracer as it is."""
    return x if isinstance(x, Tracer) else np.asarray(x)

"""Conversations: a cache that further turns extend, so that what was read is not read again."""

import os
from collections.abc import Generator, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import BLOCK_SIZES
from seer_jax.checks import whole_number
from seer_jax.inference.conversation.saved import SavedConversation, identity
from seer_jax.inference.generate import Generated, stream_behind
from seer_jax.inference.memory import available_memory, bytes_of_cache, check_room, device_bytes
from seer_jax.inference.prompts import bucket, check_prompt, check_prompts
from seer_jax.inference.request import ProgramSizes, Request, RequestSettings
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer, check_weights
from seer_jax.selection.policies import Given, Policy

LARGEST_BLOCK = BLOCK_SIZES[-1]
STEPS = 8  # new tokens that are made before the host looks
# Tokens that are read at a time. A turn is short beside what it follows, and is filled up to whole chunks; smaller ones keep a large GPU less busy.
CHUNK = 1024
FIXED = ("prefill", "decode", "cache_capacity", "prefill_chunk")  # settings of the conversation, not of a turn


class Conversation:
    """Turns of one row of tokens, each read behind the ones before it.

    A turn reads its own tokens, and those of the answer before it, in chunks against the cache; the rest is not read again. What was read
    stays as it was read: rules that ask for a prompt's length (`TopK`, `dense_last_rows`) ask the rows that are read in a turn for the length so far. Under other policies a
    turn's tokens are those of `generate` with all tokens so far as its prompt. All turns share one program for reading and one for
    new tokens, whatever their lengths, unless one asks for more new tokens than those before it.

    Attributes:
      model: whose conversation it is.
      capacity: tokens that there is room for.
      tokens: all so far, answers included.
    """

    def __init__(
        self,
        model: Transformer,
        capacity: int,
        *,
        prefill: Policy | None = None,
        decode: Policy | None = None,
        prefill_chunk: int | None = None,
    ):
        """Starts an empty conversation.

        Args:
          model: with the gates that the policies need.
          capacity: tokens of all turns and answers; the cache takes memory for them, and for one further chunk, from the start.
          prefill, decode: as in `Request`.
          prefill_chunk: tokens that are read at a time, a multiple of the block size: a turn is filled up to whole chunks. 0: all at once.
            None: 1024, or what the capacity needs.

        Raises:
          ValueError: a setting is out of its domain, or a policy does not fit the model or looks at whole prompts.
          MemoryError: the device has no room for the cache.
        """
        self._prepare(model, capacity, prefill=prefill, decode=decode, prefill_chunk=prefill_chunk)
        check_weights(model)
        self._cache = self._empty_cache(self._room)

    @classmethod
    def check(cls, model: Transformer, capacity: int, **settings: Any) -> None:
        """Raises what the constructor would, and allocates nothing: for a model of shapes, before its weights are loaded."""
        object.__new__(cls)._prepare(model, capacity, **settings)

    def _prepare(
        self,
        model: Transformer,
        capacity: int,
        *,
        prefill: Policy | None = None,
        decode: Policy | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        """Everything but the cache."""
        whole_number("capacity", capacity)
        if prefill_chunk is not None:
            must = "an integer of at least 0 (0: whole turns at once)"
            whole_number("prefill_chunk", prefill_chunk, must, least=0)
        whole = -(-bucket(capacity) // LARGEST_BLOCK) * LARGEST_BLOCK
        chunk = min(CHUNK, whole) if prefill_chunk is None else int(prefill_chunk) or whole
        settings: dict[str, Any] = dict(max_new_tokens=1, prefill=prefill, decode=decode, prefill_chunk=chunk)
        self._request = Request.of(model, **settings)
        if any(isinstance(policy, Given) for policy in (self._request.prefill, self._request.decode)):
            raise ValueError(
                "The policies of a conversation must choose blocks of any number of tokens; got Given masks. Use a rule."
            )
        self.model, self.capacity, self.tokens = model, int(capacity), list[int]()
        self._read = 0  # tokens that prefill has read
        self._changes = 0  # turns begun and taken back, by which an earlier turn knows that it is none any more
        self._new_tokens = 1  # most that a program has room for so far: a turn that asks for fewer takes that program
        # The last chunk of a turn may reach a chunk beyond its tokens.
        self._room = (-(-capacity // chunk) + 1) * chunk
        if available_memory(model) is not None:
            cache = jax.eval_shape(lambda: self._empty_cache(self._room))
            parts = {"weights": device_bytes(model), "cache": bytes_of_cache(model, cache)}
            check_room("The conversation", model, parts, "Lower `capacity`, or take shorter prompts.")

    def generate(self, tokens: Sequence[int], **settings: Unpack[RequestSettings]) -> Generated:
        """Reads a turn's tokens, and continues them; see `stream`."""
        turn = self.stream(tokens, **settings)
        while True:
            try:
                next(turn)
            except StopIteration as end:
                return end.value

    def stream(
        self, tokens: Sequence[int], *, chunk: int = STEPS, **settings: Unpack[RequestSettings]
    ) -> Generator[list[int], None, Generated]:
        """Reads a turn's tokens, and gives the answer's tokens while they are made.

        What was made belongs to the conversation, also where the generator is closed before its end. Another turn, or `rewind`, ends it.

        Args:
          tokens: of the turn, at least one.
          chunk: as in `stream`.
          **settings: as in `generate`, without policies and sizes, which are the conversation's.

        Yields:
          New tokens.

        Returns:
          As the generator's value what `generate` returns for one row; `prefill_kept` of the tokens that this turn read.

        Raises:
          ValueError: the tokens are none of the model's, there is no room for them and the answer, or a setting is out of its domain.
        """
        whole_number("chunk", chunk)
        for name in FIXED:
            if name in settings:
                raise ValueError(
                    f"{name} must be set for a conversation as a whole; got {dict(settings)[name]} for a turn. Start a new one."
                )
        given: dict[str, Any] = self.policies | dict(prefill_chunk=self._request.prefill_chunk)
        request = Request.of(self.model, **{**given, **settings})  # pyright: ignore[reportArgumentType]
        request.require_key()
        every = [*self.tokens, *check_prompt(tokens, "A turn", vocab_size=self.model.config.vocab_size)]
        request.check_context(self.model, len(every))
        if len(every) + request.max_new_tokens - 1 > self.capacity:
            raise ValueError(
                f"A conversation must have room for its tokens and the answer: {len(every)} + {request.max_new_tokens} - 1 tokens; got "
                f"capacity {self.capacity}. Lower max_new_tokens, go back by `rewind`, or save it and load it with more capacity."
            )
        return self._turn(request, every, chunk, self._changes)

    def branch(self) -> "Conversation":
        """A conversation that goes on from here by itself; it has a cache of its own."""
        self._renew()
        other = object.__new__(Conversation)
        vars(other).update(vars(self), tokens=list(self.tokens), _cache=jax.tree.map(jnp.copy, self._cache))
        return other

    def rewind(self, tokens: int) -> int:
        """Goes back to the first `tokens` tokens, and forgets those behind them.

        Returns:
          How many of them the next turn does not read again: whole blocks.

        Raises:
          ValueError: the conversation has fewer tokens.
        """
        whole_number("tokens", tokens, "an integer of at least 0", least=0)
        if tokens > len(self.tokens):
            raise ValueError(
                f"A conversation must have the tokens that it goes back to; got {tokens}, of {len(self.tokens)}. Go back to fewer."
            )
        del self.tokens[tokens:]
        self._read = min(self._read, tokens)
        self._changes += 1
        return self._start

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the conversation as a folder, from which `load` goes on: `conversation.json`, and the cache as safetensors.

        An earlier conversation there is replaced as one step.

        Raises:
          ValueError: a policy can't be saved, as its scorer is not registered.
          NotImplementedError: the model lies on devices of several processes.
          OSError: the folder can't be written.
        """
        _require_one_process("save")
        self._renew()
        kept = self.policies | dict(prefill_chunk=self._request.prefill_chunk)
        about: dict[str, Any] = dict(tokens=self.tokens, read=self._read, capacity=self.capacity, **kept)
        arrays = {}
        for (name, x), shape in zip(_named(self._cache), self._shapes(), strict=True):
            arrays[name] = np.asarray(x[tuple(map(slice, shape))])
        SavedConversation(**about, belongs_to=identity(self.model, **self.policies)).write(folder, arrays)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Transformer, *, capacity: int | None = None) -> "Conversation":
        """The conversation that `save` wrote: its next answers are those that it would have given then.

        Policies and sizes are those of the saved one.

        Args:
          folder: of the conversation.
          model: with the weights and gates that it was saved with, on a mesh or not.
          capacity: as in `Conversation`; None: as it was.

        Raises:
          FileNotFoundError: there is no conversation.
          ValueError: model, dtype, a gate or the layout version differs, the capacity is too small, or a file is damaged.
          MemoryError: the device has no room for the cache.
          NotImplementedError: the model lies on devices of several processes.
        """
        _require_one_process("load")
        saved = SavedConversation.read_folder(folder)
        room = saved.capacity if capacity is None else capacity
        whole_number("capacity", room)
        if room < (needed := len(saved.tokens) - 1):  # the last token of an answer is never fed
            raise ValueError(
                f"capacity must be at least the {needed} tokens of the conversation in {folder} but its last; got {room}. Raise it, or leave it out."
            )
        saved.check_fits(model, folder)
        settings: dict[str, Any] = {name: getattr(saved, name) for name in ("prefill", "decode", "prefill_chunk")}
        talk = cls(model, room, **settings)
        check_prompts([saved.tokens or [0]], None, vocab_size=model.config.vocab_size)
        talk.tokens, talk._read = saved.tokens, saved.read
        talk._restore(saved.arrays(folder), str(folder))
        return talk

    def _shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the cache's arrays for the tokens that further turns do not read again."""
        tokens = max(self._start, self._block)
        return [x.shape for x in jax.eval_shape(lambda: jax.tree.leaves(self._empty_cache(tokens)))]

    def _restore(self, arrays: dict[str, np.ndarray], folder: str) -> None:
        """Fills the cache, which is empty."""
        leaves = []
        for (name, x), shape in zip(_named(self._cache), self._shapes(), strict=True):
            given = arrays.get(name)
            if given is None or (given.shape, given.dtype) != (shape, x.dtype):
                got = "none" if given is None else f"{given.dtype} {given.shape}"
                raise ValueError(
                    f"The cache in {folder} must hold {name}, {x.dtype} {shape}; got {got}. Save the conversation anew."
                )
            whole = np.zeros(x.shape, x.dtype)
            whole[tuple(map(slice, shape))] = given
            leaves.append(jax.device_put(whole, x.sharding if x.committed else None))
        self._cache = jax.tree.unflatten(jax.tree.structure(self._cache), leaves)

    def _turn(
        self, request: Request, every: list[int], chunk: int, changes: int
    ) -> Generator[list[int], None, Generated]:
        self._check_goes_on(changes)
        self._changes += 1
        if (new := int(request.max_new_tokens)) > self._new_tokens:
            self._new_tokens = bucket(new)
        sizes = ProgramSizes(
            width=self._room,
            new_tokens=self._new_tokens,
            capacity=self._room,
            asked_width=self._room,
            asked_capacity=self._room,
            chunk=self._request.prefill_chunk,
        )
        self._renew()
        start = self._start

        def keep(cache: Cache, answer: list[int]) -> None:
            self._cache, self.tokens, self._read = cache, [*every, *answer], len(every)

        cache = self._cache
        pieces = stream_behind(self.model, request, every[start:], cache, start, sizes, chunk=chunk, keep=keep)
        while True:
            self._check_goes_on(changes + 1)
            try:
                (piece,) = next(pieces)
            except StopIteration as end:
                return end.value
            yield piece

    def _renew(self) -> None:
        """Makes an empty cache where the conversation's own was lost, so that the next turn reads everything: a program that is interrupted
        takes the cache with it."""
        if any(x.is_deleted() for x in jax.tree.leaves(self._cache)):
            self._cache, self._read = self._empty_cache(self._room), 0

    def _check_goes_on(self, changes: int) -> None:
        """Raises ValueError in a turn that another one, or `rewind`, has come before."""
        if changes != self._changes:
            raise ValueError(
                "A turn must be the newest of its conversation to go on; got one that another turn or `rewind` came before. Begin it anew, "
                "or take a branch for each."
            )

    @property
    def policies(self) -> dict[str, Policy]:
        """The policies of all turns, "prefill" and "decode"."""
        prefill, decode = self._request.prefill, self._request.decode
        assert prefill is not None and decode is not None
        return dict(prefill=prefill, decode=decode)

    @property
    def _block(self) -> int:
        """Tokens that are whole blocks of policy and gates: where reading may begin."""
        policies = self.policies
        return self.model.whole_blocks(policies["prefill"], keeps_decode_keys=policies["decode"].needs_gate)

    @property
    def _start(self) -> int:
        """Position at which the next turn begins to read."""
        return self._read // self._block * self._block

    def _empty_cache(self, capacity: int) -> Cache:
        model, policies = self.model, self.policies
        gates = [
            gate.config if gate is not None and policies[phase].needs_gate else None
            for gate, phase in ((model.decode_gate, "decode"), (model.prefill_gate, "prefill"))
        ]
        return model.empty_cache(1, capacity, *gates)


def _named(cache: Cache) -> list[tuple[str, jax.Array]]:
    """The arrays of a cache with their names, such as decode_gate.keys."""
    return [(jax.tree_util.keystr(path).lstrip("."), x) for path, x in jax.tree_util.tree_leaves_with_path(cache)]


def _require_one_process(verb: str) -> None:
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"A conversation must lie on devices of one process to {verb} it; got {jax.process_count()} processes. Use a mesh of one host's "
            "devices."
        )

"""The compiled programs of an engine and the slots that they work on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.checks import BLOCK_SIZES
from seer_jax.checks import whole_number
from seer_jax.inference.engine.requests import MOST_STOP_TOKENS
from seer_jax.inference.engine.row_sampling import RowSampling
from seer_jax.inference.engine.slots import Piece, RowSettings, Slots, decode_steps, read_piece
from seer_jax.inference.memory import available_memory, bytes_of_cache, check_room, device_bytes, laid_out_bytes
from seer_jax.inference.prompts import bucket
from seer_jax.inference.request import PREFILL_CHUNK, Request
from seer_jax.inference.sampling import Greedy
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer, check_weights
from seer_jax.selection.policies import Given
from seer_jax.sharding.table import DATA, FSDP

# Each size of pieces is a program to compile: how many, how many times smaller each is than the one before, tokens of the smallest.
SIZES, SMALLER, SMALLEST = 3, 4, 256
FILLED = 0.75  # share of a piece that a prompt must fill, or a smaller one is taken
LOWER = "Take fewer slots or a smaller capacity, or free other memory of the device."


class ReadPiece(NamedTuple):
    """A piece of a prompt that is to be read.

    Fields:
      row: slot.
      prompt: all its tokens.
      start, size: of the piece, padding included.
      settings: of the request.
    """

    row: int
    prompt: list[int]
    start: int
    size: int
    settings: RowSettings

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends in it."""
        return self.start + self.size >= len(self.prompt)


class StepSizes(NamedTuple):
    """How much a step of an `Engine` does; see there."""

    prefill_chunk: int | None
    prefill_tokens: int | None
    decode_steps: int


class Programs:
    """Slots, and what reads into them and decodes them; everything is compiled when this is made.

    Attributes:
      chunk: tokens of the largest piece of a prompt.
      prefill_tokens: of prompts that a step reads at most.
      sizes: of pieces, the largest first.
      slots: where the rows stand; None after `close`.
    """

    def __init__(self, model: Transformer, slots: int, capacity: int, step: StepSizes, **settings: Any):
        """See `Engine`.

        Args:
          model, slots, capacity, step: see there.
          settings: policies and `beyond_context`, as in `Request`.
        """
        for name, number in (("slots", slots), ("capacity", capacity), ("decode_steps", step.decode_steps)):
            whole_number(name, number)
        self.chunk = usual_chunk(capacity) if step.prefill_chunk is None else step.prefill_chunk
        whole_number("prefill_chunk", self.chunk)
        self.prefill_tokens = self.chunk if step.prefill_tokens is None else step.prefill_tokens
        must = f"at least a prefill_chunk of {self.chunk} tokens"
        whole_number("prefill_tokens", self.prefill_tokens, must, least=self.chunk)
        request = Request.of(model, max_new_tokens=1, prefill_chunk=self.chunk, **settings)
        assert request.prefill is not None and request.decode is not None
        if any(isinstance(policy, Given) for policy in (request.prefill, request.decode)):
            raise ValueError(
                "The policies of an engine must choose blocks of any number of tokens; got Given masks. Use a rule."
            )
        _check_mesh(model)
        check_weights(model)
        self._model, self._steps = model, step.decode_steps
        self._prefill, self._decode = request.prefill, request.decode
        multiple = model.whole_blocks(self._prefill, keeps_decode_keys=self._decode.needs_gate)
        self.sizes = piece_sizes(self.chunk, multiple)
        room = room_for(capacity, self.sizes)
        self._empty = RowSettings.empty(1, MOST_STOP_TOKENS, RowSampling.of(Greedy(), model.config.vocab_size))
        self._check_memory(slots, room)
        rest = jax.tree.map(lambda x: np.repeat(x, slots, axis=0), self._empty)
        self.slots: Slots | None = Slots.of(self._empty_cache(slots, room), rest)
        self._check_memory(slots, room, compiled=True)
        self._warm_up(slots)

    def read(self, piece: ReadPiece) -> Int[Array, "1 3"]:
        """Reads a piece; see `read_piece`."""
        assert self.slots is not None
        self.slots, outcome = read_piece(self._model, self._prefill, self.slots, _as_arrays(piece))
        return outcome

    def decode(self, alive: Bool[np.ndarray, "B"]) -> Int[Array, "B N"]:
        """Makes tokens; see `decode_steps`."""
        assert self.slots is not None
        self.slots, outcome = decode_steps(self._model, self._decode, self.slots, alive, steps=self._steps)
        return outcome

    def close(self) -> None:
        """Gives the cache's memory back."""
        self.slots = None

    def _warm_up(self, slots: int) -> None:
        """Compiles everything by running it: twice, as arrays that programs made may lie elsewhere than those that they were first given."""
        none_alive = np.zeros(slots, bool)
        for _ in range(2):
            for size in self.sizes:
                self.read(ReadPiece(0, [0] * size, 0, size, self._empty))
            jax.block_until_ready(self.decode(none_alive))

    def _check_memory(self, slots: int, room: int, *, compiled: bool = False) -> None:
        """Raises MemoryError where the device tells that there is too little for weights and cache, or for the programs too."""
        if available_memory(self._model) is None:
            return
        cache = jax.eval_shape(lambda: self._empty_cache(slots, room))
        parts = {"weights": device_bytes(self._model), "cache": bytes_of_cache(self._model, cache)}
        if compiled:  # the calls themselves do not compile again; the cache is in use by now
            del parts["cache"]
            parts["scratch"] = max(laid_out_bytes(program.compile()) or 0 for program in self._lowered(slots))
        check_room("The engine", self._model, parts, LOWER)

    def _lowered(self, slots: int) -> Iterator[jax.stages.Lowered]:
        """All programs, not compiled."""
        assert self.slots is not None
        for size in self.sizes:
            yield read_piece.lower(
                self._model, self._prefill, self.slots, _as_arrays(ReadPiece(0, [], 0, size, self._empty))
            )
        yield decode_steps.lower(self._model, self._decode, self.slots, np.zeros(slots, bool), steps=self._steps)

    def _empty_cache(self, slots: int, room: int) -> Cache:
        gates = [
            gate.config if gate is not None and policy.needs_gate else None
            for gate, policy in ((self._model.decode_gate, self._decode), (self._model.prefill_gate, self._prefill))
        ]
        return self._model.empty_cache(slots, room, *gates)


def _as_arrays(piece: ReadPiece) -> Piece:
    """What a program takes of a piece."""
    tokens = np.zeros((1, piece.size), np.int32)
    part = piece.prompt[piece.start : piece.start + piece.size]
    tokens[0, : len(part)] = part
    row, start = (np.asarray(x, np.int32) for x in (piece.row, piece.start))
    return Piece(tokens, np.asarray([len(piece.prompt)], np.int32), row, start, piece.settings)


def usual_chunk(capacity: int) -> int:
    """Tokens of the largest piece of a prompt, in whole blocks of any size.

    >>> usual_chunk(100), usual_chunk(131072)
    (128, 8192)
    """
    return min(PREFILL_CHUNK, -(-bucket(capacity) // BLOCK_SIZES[-1]) * BLOCK_SIZES[-1])


def piece_sizes(chunk: int, multiple: int) -> list[int]:
    """Sizes of pieces: the chunk and smaller ones, multiples of so many tokens.

    >>> piece_sizes(8192, 64), piece_sizes(1024, 64), piece_sizes(384, 64)
    ([8192, 2048, 512], [1024, 256], [384])
    """
    sizes = [chunk]
    while len(sizes) < SIZES and sizes[-1] % SMALLER == 0 and sizes[-1] // SMALLER >= SMALLEST:
        if (smaller := sizes[-1] // SMALLER) % multiple:
            break
        sizes.append(smaller)
    return sizes


def piece_size(left: int, sizes: list[int]) -> int:
    """The size of the next piece of a prompt of which `left` tokens are left: the largest one that they fill well.

    >>> [piece_size(left, [8192, 2048, 512]) for left in (20000, 6144, 6143, 1536, 1535, 1)]
    [8192, 8192, 2048, 2048, 512, 512]
    """
    return next((size for size in sizes if left >= FILLED * size), sizes[-1])


def room_for(capacity: int, sizes: list[int]) -> int:
    """Largest position at which the last piece of a prompt of up to `capacity` tokens ends.

    >>> room_for(32768, [8192, 2048, 512]), room_for(33024, [8192, 2048, 512]), room_for(40000, [8192, 2048, 512])
    (32768, 33280, 40960)
    """

    def end(length: int) -> int:
        place = length // sizes[0] * sizes[0]
        while place < length:
            place += piece_size(length - place, sizes)
        return place

    return max(map(end, range(max(1, capacity - sizes[0]), capacity + 1)))


def _check_mesh(model: Transformer) -> None:
    """Raises NotImplementedError where the model's mesh would split the rows of a batch, or lies on several hosts."""
    if model.layout is None:
        return
    if (copies := model.layout.size(DATA, FSDP)) > 1:
        raise NotImplementedError(
            f"An engine's model must lie on a mesh that splits no rows, such as tensor=2, since each slot is read by itself; got data and "
            f"fsdp of {copies} together. Use tensor alone, or an engine for each part of the devices."
        )
    devices = model.layout.mesh.devices
    assert devices is not None  # as the model has weights
    if (processes := len({device.process_index for device in devices.flat})) > 1:
        raise NotImplementedError(
            f"An engine's model must lie on devices of one process, since requests come to each process by itself; got {processes} processes. "
            "Use a mesh of one host's devices, and an engine for each host."
        )

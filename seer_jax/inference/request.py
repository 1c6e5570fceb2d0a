"""What a generation should do, besides reading its prompts."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from jaxtyping import Int

from seer_jax.checks import whole_number
from seer_jax.inference.prompts import bucket
from seer_jax.inference.sampling import Greedy, Keys, Sample, Sampling, check_key
from seer_jax.models.decoder import Transformer, check_model
from seer_jax.selection.policies import Dense, Policy, check_policy

# Prompts up to so many tokens are read at once, as all block rows of theirs are chosen at once; longer ones in chunks. A chunk of 8192
# tokens keeps a large GPU busy in every layer, and takes 1/16 of the activations of 128k tokens.
WHOLE_PROMPT, PREFILL_CHUNK = 32768, 8192
CAPACITIES_PER_OCTAVE = 4  # of caches for prompts in chunks
CACHE_MULTIPLE = 64  # tokens; caches of a model without a decode gate are rounded up to this
EOS_MULTIPLE = 8  # programs take multiples of so many EOS tokens
NO_TOKEN = -1  # fills them up


class RequestSettings(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `plan_memory`: the fields of `Request`."""

    max_new_tokens: int
    prefill: Policy | None
    decode: Policy | None
    sampling: Sampling
    key: Keys | None
    eos: int | Sequence[int] | np.ndarray | None
    cache_capacity: int | None
    beyond_context: bool
    prefill_chunk: int | None


class ProgramSizes(NamedTuple):
    """Sizes of the arrays that a program is compiled for; requests of similar sizes share them.

    Fields:
      width: tokens of the padded prompts.
      new_tokens: new tokens that there is room for in the results.
      capacity: tokens that the cache has room for in each row.
      asked_width, asked_capacity: what they would be if the cache alone were rounded up, to whole blocks. Masks of the caller's
        own cover these.
      chunk: tokens of the prompts that are read at a time; None: all at once.
    """

    width: int
    new_tokens: int
    capacity: int
    asked_width: int
    asked_capacity: int
    chunk: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How prompts are continued.

    Attributes:
      max_new_tokens: N >= 1.
      prefill: which blocks attention keeps while the prompts are read; None: what the model's prefill gate recommends, otherwise `Dense()`.
      decode: which cached blocks each new token attends to; None: what the model's decode gate recommends, otherwise `Dense()`.
      sampling: how tokens are drawn.
      key: a PRNG key, or one for each row, where `sampling` draws at random. A row's tokens depend on its own key and
        prompt, never on its neighbours; row i of a single key uses `fold_in(key, i)`.
      eos: tokens that end a row, one or several; None: `model.config.eos_token_ids`; (): none.
      cache_capacity: S, tokens that the cache has room for in each row, rounded up to whole blocks; None: enough for the prompts and
        all new tokens, whose numbers are rounded up to those that programs are compiled for (`bucket`).
      beyond_context: allow more tokens than the model's context (`ModelConfig.context`).
      prefill_chunk: tokens of the prompts that are read at a time, a multiple of the block size: a program takes as much memory beside
        its cache whatever the length of the prompts, and one program serves prompts of all lengths that its cache has room for. 0: all at
        once. None: all at once up to 32768 tokens, and above that 8192 at a time where the policy for prompts allows it.
    """

    max_new_tokens: int
    prefill: Policy | None = None
    decode: Policy | None = None
    sampling: Sampling = Greedy()
    key: Keys | None = None
    eos: int | Sequence[int] | np.ndarray | None = None
    cache_capacity: int | None = None
    beyond_context: bool = False
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens)
        for name in ("prefill", "decode"):
            policy = getattr(self, name)
            if policy is not None:
                check_policy(name, policy)
                policy.check_phase(name)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling must be Greedy() or Sample(temperature, ...); got {self.sampling!r}.")
        if self.key is not None:
            check_key(self.key)
        if self.eos is not None:
            _token_ids(self.eos)
        if self.cache_capacity is not None:
            whole_number("cache_capacity", self.cache_capacity)
        if self.prefill_chunk is not None:
            must = "an integer of at least 0 (0: the whole prompt at once)"
            whole_number("prefill_chunk", self.prefill_chunk, must, least=0)
        if not isinstance(self.beyond_context, bool | np.bool_):
            raise ValueError(f"beyond_context must be True or False; got {self.beyond_context!r}.")

    @classmethod
    def of(cls, model: Transformer, **settings: Unpack[RequestSettings]) -> "Request":
        """The request with the model's recommendations where no policy is named, checked against the model.

        Raises:
          ValueError: a setting is unknown or out of its domain, or a policy does not fit the model.
        """
        check_model(model)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"A generation's settings must be some of {', '.join(names)}; got {name}.{hint}")
        if "max_new_tokens" not in settings:
            raise ValueError("max_new_tokens must be an integer of at least 1; got none.")
        return cls(**settings).for_model(model)  # pyright: ignore[reportCallIssue]

    def for_model(self, model: Transformer) -> "Request":
        """See `of`."""
        prefill, decode = (
            policy or (None if gate is None else gate.recommended) or Dense()
            for policy, gate in ((self.prefill, model.prefill_gate), (self.decode, model.decode_gate))
        )
        model.segments(prefill, model.prefill_gate, model.config.num_heads, "prefill")
        model.segments(decode, model.decode_gate, model.config.num_kv_heads, "decode")
        if self.prefill_chunk:
            model.check_chunk(self.prefill_chunk, prefill, keeps_decode_keys=decode.needs_gate)
        return dataclasses.replace(self, prefill=prefill, decode=decode)

    def require_key(self) -> None:
        """Raises ValueError where tokens are drawn at random and there is no key."""
        if isinstance(self.sampling, Sample) and self.key is None:
            raise ValueError(
                f"{self.sampling} draws at random, so a key must be given; got None. Pass key=jax.random.key(seed)."
            )

    def end_tokens(self, model: Transformer) -> Int[np.ndarray, "E"]:
        """Tokens that end a row, filled up with `NO_TOKEN` to a multiple of 8.

        Raises:
          ValueError: one is not in the vocabulary.
        """
        vocab_size = model.config.vocab_size
        ids = _token_ids(model.config.eos_token_ids if self.eos is None else self.eos)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"EOS tokens must lie in [0, {vocab_size}), the model's vocabulary; got {ids.tolist()}.")
        fill = EOS_MULTIPLE if not ids.size else -ids.size % EOS_MULTIPLE
        return np.pad(ids.astype(np.int32), (0, fill), constant_values=NO_TOKEN)

    def check_context(self, model: Transformer, longest: int) -> None:
        """Raises ValueError where a prompt of `longest` tokens and the new ones exceed the model's context."""
        context, new = model.config.context, self.max_new_tokens
        if longest + new > context and not self.beyond_context:
            raise ValueError(
                f"Prompt and new tokens must fit the model's context of {context} tokens; got {longest} + {new}. "
                "Shorten the prompt or max_new_tokens, load the model with a RoPE scaling for longer contexts, or pass "
                "beyond_context=True."
            )

    def chunk(self, width: int) -> int | None:
        """Tokens of prompts of `width` tokens that are read at a time; None: all. See `prefill_chunk`."""
        if self.prefill_chunk is not None:
            return int(self.prefill_chunk) or None
        assert self.prefill is not None
        return PREFILL_CHUNK if width > WHOLE_PROMPT and self.prefill.reads_in_chunks else None

    def sizes(self, model: Transformer, width: int, longest: int) -> ProgramSizes:
        """What the program is compiled for.

        Args:
          model: whose decode gate sets the size of a block.
          width: T, tokens of the padded prompts.
          longest: tokens of the longest prompt.

        Raises:
          ValueError: the tokens exceed the model's context or `cache_capacity`.
        """
        self.check_context(model, longest)
        multiple = CACHE_MULTIPLE if model.decode_gate is None else model.decode_gate.config.block_size
        new = int(self.max_new_tokens)
        new_tokens = new if new == 1 else bucket(new)  # a single one needs no decoding
        chunk = self.chunk(width)
        if chunk is not None and self.cache_capacity is None:
            asked = -(-(width + new - 1) // multiple) * multiple
            capacity = chunked_capacity(width + new_tokens - 1, math.lcm(chunk, multiple))
            return ProgramSizes(capacity, new_tokens, capacity, width, asked, chunk)
        if self.cache_capacity is None:
            wide = bucket(width)
            capacity, asked = (-(-(size - 1) // multiple) * multiple for size in (wide + new_tokens, width + new))
            return ProgramSizes(wide, new_tokens, capacity, width, asked)
        needed = max(width, longest + new - 1)  # the last token is never fed
        if self.cache_capacity < needed:
            raise ValueError(
                f"The cache must hold the padded prompts and all new tokens but the last, {needed} tokens; got "
                f"cache_capacity={self.cache_capacity}. Raise it, leave it out, or lower max_new_tokens."
            )
        capacity = -(-int(self.cache_capacity) // multiple) * multiple
        if chunk is not None:
            whole = math.lcm(chunk, multiple)
            rounded = -(-capacity // whole) * whole
            return ProgramSizes(rounded, new_tokens, rounded, width, capacity, chunk)
        return ProgramSizes(min(bucket(width), capacity), new_tokens, capacity, width, capacity)


def chunked_capacity(tokens: int, chunk: int) -> int:
    """The room of a cache for `tokens` tokens, of prompts that are read in chunks: of a few sizes, since each has a program of its own.

    Whole chunks, up to 8 any number of them, above that quarters of the power of two below: at most a quarter more.

    >>> [chunked_capacity(n, 8192) // 8192 for n in (1, 65536, 65537, 131072, 131073)]
    [1, 8, 10, 16, 20]
    """
    chunks = -(-tokens // chunk)
    step = max(1, 2 ** ((chunks - 1).bit_length() - 1) // CAPACITIES_PER_OCTAVE) if chunks > 1 else 1
    return -(-chunks // step) * step * chunk


def _token_ids(eos: Any) -> Int[np.ndarray, "E"]:
    """The tokens that `Request.eos` names, one or several."""
    ids = np.atleast_1d(np.asarray(eos)) if np.size(eos) else np.zeros(0, np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"eos must be one token id, several, or () for none, as integers; got {eos!r}.")
    return ids

"""What lm-evaluation-harness asks of a model, in plain values: likelihoods of continuations and of texts, and continuations.

Likelihoods come from one pass over prompt and continuation, as prompts are read: under the prefill policy; the decode policy has no part
in them. Continuations are made under both. Prompts that exceed the context lose their beginning.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from seer_jax.checks import whole_number
from seer_jax.inference.generate import stream
from seer_jax.inference.prompts import bucket, pad_prompts
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.passes import read_layers
from seer_jax.models.decoder.stack import Segment
from seer_jax.selection.policies import Policy
from seer_jax.sharding.on_mesh import OF_ROWS
from seer_jax.sharding.vocabulary import score_targets

CHUNK = 64  # tokens of each row whose logits exist at once
STEPS = 16  # new tokens from one look for stop strings to the next
MAX_NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names, the first one counts
KNOWN = ("until", "do_sample", "temperature", "top_p", "top_k", *MAX_NEW_TOKENS)


class Row(NamedTuple):
    """Tokens of which the last ones are scored."""

    tokens: list[int]
    scored: int


class Likelihood(NamedTuple):
    """Log-probability of a continuation, nats, and whether greedy decoding gives it."""

    logprob: float
    is_greedy: bool


class Asked(NamedTuple):
    """How a prompt is continued."""

    new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]


@dataclasses.dataclass
class HarnessModel:
    """A model behind the requests of lm-evaluation-harness.

    Attributes:
      model: with the gates that the policies need.
      tokenizer: of the model.
      prefill, decode: policies; None: what the gates recommend, otherwise dense attention.
      batch_size: rows at a time.
      max_length: tokens of a row; None: the model's context.
      new_tokens: of a continuation whose request names no number.
      seed: of requests that draw at random.
      beyond_context: allow rows of more tokens than the model's context.
      prefill_chunk: tokens of the prompts of continuations that are read at a time, see `Request`.
      kept: by phase, for each row so far, the share of the visible blocks that attention read.
    """

    model: Transformer
    tokenizer: Tokenizer
    prefill: Policy | None = None
    decode: Policy | None = None
    batch_size: int = 8
    max_length: int | None = None
    new_tokens: int = 256
    seed: int = 0
    beyond_context: bool = False
    prefill_chunk: int | None = None
    kept: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"prefill": [], "decode": []})

    def __post_init__(self) -> None:
        for name in ("batch_size", "new_tokens"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, "an integer of at least 0", least=0)
        if self.max_length is None:
            self.max_length = self.model.config.context
        whole_number("max_length", self.max_length, "an integer of at least 2", least=2)
        if self.context > self.model.config.context and not self.beyond_context:
            raise ValueError(
                f"max_length must be at most {self.model.config.context}, the model's context; got {self.max_length}. Lower it, or pass "
                "beyond_context=True."
            )
        # As generations take them.
        request = Request.of(self.model, max_new_tokens=1, prefill=self.prefill, decode=self.decode)
        self.prefill, self.decode = request.prefill, request.decode

    @property
    def context(self) -> int:
        """Tokens of a row."""
        assert self.max_length is not None
        return self.max_length

    @property
    def prefix(self) -> int:
        """The token before a text without context: BOS, otherwise EOS."""
        for name in ("bos_token", "eos_token"):
            if (text := self.tokenizer.special.get(name)) is not None:
                return self.tokenizer.encode(text, special_tokens=False)[0]
        return self.model.config.eos_token_ids[0]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; BOS is not added before a text that begins with it, as rendered chats do."""
        bos = self.tokenizer.special.get("bos_token")
        return self.tokenizer.encode(text, special_tokens=not (bos and text.startswith(bos)))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Log-probability of each continuation after its context.

        Args:
          pairs: (context, continuation); "" as context stands for the beginning of a text.

        Raises:
          ValueError: a continuation has no token, or more than fit the context.
        """
        rows = [self._row(*pair) for pair in pairs]
        tokens = _cut([row.tokens for row in rows], [self.context] * len(rows))
        return self.score([row._replace(tokens=kept) for row, kept in zip(rows, tokens, strict=True)])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` tokens; each token is predicted once."""
        windows = [list(self._windows(self.tokenizer.encode(text, special_tokens=False))) for text in texts]
        scored = iter(self.score([row for rows in windows for row in rows]))
        return [sum(next(scored).logprob for _ in rows) for rows in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continuations, up to the first stop string.

        Args:
          requests: (context, settings): `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`, `top_k`.

        Raises:
          ValueError: a setting is unknown or out of its domain, or leaves no room for the prompt.
        """
        asked = [self._asked(settings) for _, settings in requests]
        prompts = [self._prompt(text, one.new_tokens) for (text, _), one in zip(requests, asked, strict=True)]
        prompts = _cut(prompts, [self.context - one.new_tokens for one in asked])
        groups: dict[tuple[int, str], list[int]] = {}
        for number in sorted(range(len(requests)), key=lambda i: -len(prompts[i])):
            groups.setdefault((asked[number].new_tokens, str(asked[number].sampling)), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            for batch in _batches(numbers, self.batch_size):
                found.update(zip(batch, self._continue(batch, prompts, asked), strict=True))
        return [found[number] for number in range(len(requests))]

    def score(self, rows: Sequence[Row]) -> list[Likelihood]:
        """The scored ends of rows, in batches of similar length that share programs."""
        found: dict[int, Likelihood] = {}
        for numbers in _batches(sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)), self.batch_size):
            batch = [rows[i] for i in numbers]
            filled = [*batch, *batch[:1] * (self.batch_size - len(batch))]
            tokens, lengths = pad_prompts([row.tokens for row in filled])
            tokens = np.pad(tokens, ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])))
            count = bucket(max(row.scored for row in batch))
            nll, best, kept = jax.device_get(_score_ends(self.model, tokens, lengths, self.prefill, count=count))
            for i, row, loss, right in zip(numbers, batch, nll, best, strict=False):
                found[i] = Likelihood(
                    -float(loss[-row.scored :].sum(dtype=np.float64)), bool(right[-row.scored :].all())
                )
            self.kept["prefill"] += kept[: len(batch)].tolist()
        return [found[i] for i in range(len(rows))]

    def _row(self, context: str, continuation: str) -> Row:
        # Spaces between them belong to the first word of the continuation.
        stripped = context.rstrip(" ")
        context, continuation = stripped, context[len(stripped) :] + continuation
        if context:
            before, whole = self.encode(context), self.encode(context + continuation)
        else:
            before, whole = [self.prefix], [self.prefix, *self.tokenizer.encode(continuation, special_tokens=False)]
        scored = len(whole) - len(before)
        if not 1 <= scored < self.context:
            raise ValueError(
                f"A continuation must have 1 to {self.context - 1} tokens, as the context has {self.context}; got {scored} of "
                f"{continuation[:40]!r}."
            )
        return Row(whole, scored)

    def _windows(self, tokens: list[int]) -> Iterator[Row]:
        """Windows of a text, the first one after the prefix; the last one reaches back as far as the context does."""
        text, end = [self.prefix, *tokens], 1
        while end < len(text):
            new = min(self.context - 1, len(text) - end)
            end += new
            yield Row(text[max(0, end - self.context) : end], new)

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        if new_tokens >= self.context:
            raise ValueError(
                f"New tokens must leave room for the prompt in the context of {self.context} tokens; got {new_tokens}. Lower max_gen_toks."
            )
        return self.encode(text) or [self.prefix]

    def _asked(self, settings: Mapping[str, Any]) -> Asked:
        if unknown := [name for name in settings if name not in KNOWN]:
            raise ValueError(f"Settings of a generation must be some of {', '.join(KNOWN)}; got {', '.join(unknown)}.")
        until = settings.get("until") or ()
        named = (settings[name] for name in MAX_NEW_TOKENS if settings.get(name) is not None)
        temperature = settings.get("temperature")
        draws = settings.get("do_sample", bool(temperature))
        sampling = (
            Sample(
                1.0 if temperature is None else temperature,
                top_k=settings.get("top_k") or None,
                top_p=settings.get("top_p"),
            )
            if draws
            else Greedy()
        )
        return Asked(int(next(named, self.new_tokens)), sampling, (until,) if isinstance(until, str) else tuple(until))

    def _continue(self, numbers: Sequence[int], prompts: Sequence[list[int]], asked: Sequence[Asked]) -> list[str]:
        """Texts of one batch. Generation stops where every row has ended or holds one of its stop strings."""
        filled = [*numbers, *[numbers[0]] * (self.batch_size - len(numbers))]
        tokens, lengths = pad_prompts([prompts[i] for i in filled])
        one = asked[numbers[0]]
        key = jax.random.key(self.seed)
        settings: dict[str, Any] = dict(
            max_new_tokens=one.new_tokens,
            prefill=self.prefill,
            decode=self.decode,
            sampling=one.sampling,
            # A row's tokens depend on its number alone, not on its batch.
            key=None
            if isinstance(one.sampling, Greedy)
            else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array(filled)),
            eos=(*self.model.config.eos_token_ids, *self.tokenizer.end_of_turn()),
            beyond_context=self.beyond_context,
            prefill_chunk=self.prefill_chunk,
        )
        made: list[list[int]] = [[] for _ in filled]
        running = stream(self.model, tokens, lengths, chunk=STEPS, **settings)
        while True:
            try:
                new = next(running)
            except StopIteration as end:
                self._note(end.value, len(numbers))
                break
            made = [[*before, *more] for before, more in zip(made, new, strict=True)]
            if all(_stopped(self._text(row), asked[i].until) for row, i in zip(made, filled, strict=True)):
                running.close()
                break
        return [_until(self._text(row), asked[i].until) for row, i in zip(made, numbers, strict=False)]

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode_known(tokens)

    def _note(self, result: Any, count: int) -> None:
        for phase, kept in (("prefill", result.prefill_kept), ("decode", result.decode_kept)):
            self.kept[phase] += np.asarray(kept).mean(0)[:count].tolist()


@functools.partial(jax.jit, static_argnames="count")
def _score_ends(
    model: Transformer, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], policy: Policy, *, count: int
) -> tuple[Float32[Array, "B n"], Bool[Array, "B n"], Float32[Array, "B"]]:
    """-log p of the last `count` tokens of each row, whether each is the most likely one, and the share of blocks kept.

    Entries before the second token of a row hold anything.
    """
    tokens, lengths = model.check(tokens, lengths)
    segments = model.segments(policy, model.prefill_gate, model.config.num_heads, "prefill")
    return model.everywhere(model.spread(functools.partial(_ends, count), (OF_ROWS,) * 3, segments, tokens, lengths))


def _ends(
    count: int,
    model: Transformer,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[Array, Array, Array]:
    hidden, kept = read_layers(model, segments, tokens, lengths)
    size = min(CHUNK, count)
    places = jnp.maximum(lengths[:, None] - count + jnp.arange(-(-count // size) * size)[None], 1)
    places = jnp.minimum(places, tokens.shape[1] - 1)

    def chunk(columns: Int[Array, "size B"]) -> tuple[Array, Array]:
        states = jnp.take_along_axis(hidden, (columns.T - 1)[..., None], axis=1)
        targets = jnp.take_along_axis(tokens, columns.T, axis=1)
        return score_targets(model.logits(states), targets, model.shard)

    nll, best = jax.lax.map(chunk, places.T.reshape(-1, size, len(tokens)))
    columns = lambda x: jnp.swapaxes(x, 0, 1).reshape(len(tokens), -1)[:, :count]  # noqa: E731
    return columns(nll), columns(best), kept.mean(0)


def _cut(prompts: Sequence[list[int]], rooms: Sequence[int]) -> list[list[int]]:
    """The ends of the prompts for which there is room; how many lose their beginning is told by a warning."""
    longer = [len(tokens) for tokens, room in zip(prompts, rooms, strict=True) if len(tokens) > room]
    if longer:
        warnings.warn(
            f"{len(longer)} of {len(prompts)} prompts exceed the context and lose their beginning: up to {max(longer)} tokens, at least "
            f"{min(rooms)} are kept.",
            stacklevel=3,
        )
    return [tokens[-room:] for tokens, room in zip(prompts, rooms, strict=True)]


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def _until(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _stopped(text: str, until: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in until)

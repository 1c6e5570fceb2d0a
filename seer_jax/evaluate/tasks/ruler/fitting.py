"""Prompts that fill a number of tokens exactly: whole units of filler, then a tail whose length makes up the rest.

A prompt is encoded as a whole, as a model reads it, and never cut between tokens. The number of units is the largest that fits. The tail
is the beginning of the next unit, where it can be cut anywhere, or a few short words; the one is taken that makes the
prompt exactly as long as asked, if need be with some units less.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from seer_jax.evaluate.tasks.base import PromptEncoder, Sample, Task, TaskSettings
from seer_jax.evaluate.tasks.metrics import string_match_all

FEWER = 4  # units that may be given up for a tail
NEAR = 3  # tokens that words may gain or lose where they join the text
GAP = 12  # tokens that short words make up where the text's own words are longer
TRIED = 6  # tails of one size that are tried in the whole prompt
SHORT = (" so", " and", " it", " a", " the", ".", " 1")
REPEATS = 24


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt that can grow.

    Attributes:
      text: of the prompt, by the number of units and the tail that follows the last unit.
      tails: what may follow so many units, besides repeated short words.
      prefix: beginning of the answer.
      answers, depth: see `Sample`.
      least, most: numbers of units.
    """

    text: Callable[[int, str], str]
    tails: Callable[[int], Iterable[str]]
    prefix: str
    answers: tuple[str, ...]
    least: int
    most: int
    depth: float | None = None


def beginnings(words: Sequence[str]) -> list[str]:
    """The beginnings of a text, from none to all but its last word, each after a space."""
    return ["".join(f" {word}" for word in words[:count]) for count in range(len(words))]


def fit(draft: Draft, encoder: PromptEncoder, size: int) -> Sample:
    """The draft grown to a prompt of exactly `size` tokens.

    Raises:
      ValueError: the prompt has more tokens without any filler, or no tail makes it exact.
    """

    def tokens(units: int, tail: str = "") -> list[int]:
        return encoder.encode(draft.text(units, tail), draft.prefix)

    units = _largest(lambda n: len(tokens(n)), draft, size)
    for fewer in range(min(FEWER, units - draft.least + 1)):
        base = tokens(units - fewer)
        for tail in _nearest(draft.tails(units - fewer), encoder, size - len(base)):
            found = tokens(units - fewer, tail) if tail else base
            if len(found) == size:
                return Sample(np.array(found, np.int32), draft.answers, draft.depth)
    raise ValueError(
        f"A prompt must be fitted to exactly {size} tokens; no filler of {encoder.tokenizer.place} makes it so. Use another `length`."
    )


class DraftedTask(Task):
    """A task whose samples are drawn one by one and grown to the size of a prompt; scored by `string_match_all`."""

    @abc.abstractmethod
    def draft(self, rng: np.random.Generator, settings: TaskSettings) -> Draft:
        """One sample; all that is random in it comes from `rng`."""

    def samples(self, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
        size = settings.length - self.new_tokens
        rngs = (settings.generator(self.name, number) for number in range(settings.count))
        return [fit(self.draft(rng, settings), encoder, size) for rng in rngs]

    def score(self, prediction: str, sample: Sample) -> float:
        return string_match_all(prediction, sample.answers)


def _largest(count: Callable[[int], int], draft: Draft, size: int) -> int:
    """The largest number of units with at most `size` tokens; found by interpolation, as tokens grow evenly with units."""
    low, first = draft.least, count(draft.least)
    if first > size:
        raise ValueError(
            f"A prompt must have room for its text and question: at least {first} tokens besides its answer; got {size}. Raise `length`."
        )
    high, at_low, guess = draft.most + 1, first, 2 * draft.least + 8
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = count(guess)
        if found <= size:
            low, at_low = guess, found
        else:
            high = guess
        slope = max((found - first) / max(guess - draft.least, 1), 1e-3)
        guess = low + int((size - at_low) / slope)
    return low


def _nearest(tails: Iterable[str], encoder: PromptEncoder, missing: int) -> list[str]:
    """Tails whose own tokens come near to those that are missing: the text's own, these with a short word behind, short words alone."""

    def sized(candidates: Iterable[str]) -> list[tuple[str, int]]:
        return [(tail, len(encoder.tokenizer.encode(tail, special_tokens=False)) if tail else 0) for tail in candidates]

    own = sized(dict.fromkeys(["", *tails]))
    close = [(tail, size) for tail, size in own if -NEAR <= missing - size <= GAP]
    mixed = sized(
        tail + word * n for tail, size in close for n in range(1, missing - size + NEAR + 1) for word in SHORT
    )
    short = sized(word * repeats for word in SHORT for repeats in range(1, min(missing, REPEATS) + 1))
    by_size: dict[int, list[str]] = {}
    for tail, size in (*own, *mixed, *short):
        by_size.setdefault(size, []).append(tail)
    sizes = sorted((size for size in by_size if abs(size - missing) <= NEAR), key=lambda size: abs(size - missing))
    return [tail for size in sizes for tail in by_size[size][:TRIED]]

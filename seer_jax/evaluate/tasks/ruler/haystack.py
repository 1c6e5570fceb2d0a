"""Long texts with statements hidden in them at given depths, of as many units as asked."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from seer_jax.evaluate.tasks.ruler.fitting import beginnings
from seer_jax.evaluate.tasks.ruler.words import NOISE, sentences

NOISE_TAILS = beginnings(NOISE.split() * 4)
DEPTHS = 40  # evenly spaced places from the start of the text to its end, as in RULER


def draw_depths(rng: np.random.Generator, count: int) -> list[float]:
    """Different depths from 0 to 1 in growing order; more than there are places come at random ones."""
    grid = np.linspace(0, 1, DEPTHS)
    drawn = rng.choice(grid, count, replace=False) if count <= DEPTHS else rng.random(count)
    return sorted(round(float(depth), 3) for depth in drawn)


class Haystack(abc.ABC):
    """A text without meaning for the question."""

    @abc.abstractmethod
    def text(self, units: int, tail: str, hidden: Sequence[tuple[float, str]]) -> str:
        """The text with statements inserted.

        Args:
          units: of the text.
          tail: further words at its end, with a space before them.
          hidden: depths in growing order, and statements.
        """

    @abc.abstractmethod
    def tails(self, units: int) -> list[str]:
        """Words that may follow so many units."""


def insert(pieces: Sequence[str], hidden: Sequence[tuple[float, str]]) -> list[str]:
    """The pieces with statements between them; those of one place keep their order."""
    found, last = [], 0
    for depth, statement in hidden:
        place = int(len(pieces) * depth)
        found += [*pieces[last:place], statement]
        last = place
    return [*found, *pieces[last:]]


@dataclasses.dataclass(frozen=True)
class Lines(Haystack):
    """Lines, each a unit.

    Attributes:
      line: by its number.
    """

    line: Callable[[int], str]

    def text(self, units: int, tail: str, hidden: Sequence[tuple[float, str]]) -> str:
        return "\n".join(insert([self.line(i) for i in range(units)], hidden)) + (
            f"\n{tail.lstrip(' ')}" if tail else ""
        )

    def tails(self, units: int) -> list[str]:
        return NOISE_TAILS


def noise() -> Lines:
    """The same few sentences again and again."""
    return Lines(lambda number: NOISE)


@dataclasses.dataclass(frozen=True)
class Essay(Haystack):
    """Running text, whose units are words; statements stand between sentences.

    Attributes:
      source: of the text; None: generated prose.
      start: first sentence.
    """

    source: str | None
    start: int

    @classmethod
    def draw(cls, source: str | None, rng: np.random.Generator) -> "Essay":
        """The text from a random sentence on; after its end it begins again."""
        return cls(source, int(rng.integers(len(sentences(source)))))

    def text(self, units: int, tail: str, hidden: Sequence[tuple[float, str]]) -> str:
        every, pieces, at = sentences(self.source), [], self.start
        while units > 0:
            words = every[at % len(every)][:units]
            pieces.append(" ".join(words))
            units -= len(words)
            at += 1
        return " ".join(insert(pieces, hidden)) + tail

    def tails(self, units: int) -> list[str]:
        return []

"""Needles: statements hidden in a long text, of which some are asked for; RULER's eight retrieval tasks."""

import dataclasses
from typing import Literal, get_args

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.tasks.base import TaskSettings, register
from seer_jax.evaluate.tasks.ruler.fitting import Draft, DraftedTask
from seer_jax.evaluate.tasks.ruler.haystack import Essay, Haystack, Lines, draw_depths, noise
from seer_jax.evaluate.tasks.ruler.words import DRAWN, draw_distinct

Kind = Literal["words", "numbers", "uuids"]
Hay = Literal["noise", "essay", "needles"]
SHORTEST = 8  # tokens of a needle, at least


@dataclasses.dataclass(frozen=True)
class Needles(DraftedTask):
    """Retrieval of values by their keys, scored by the share of the values that the answer contains.

    Attributes:
      name: as a command line writes it.
      hay: what the needles are hidden in: a few sentences repeated, running text, or further needles of other keys.
      key_kind, value_kind: of what keys and values are.
      keys: keys that are stated.
      values: values of each key.
      queries: keys that are asked for.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    hay: Hay
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("keys", "values", "queries", "new_tokens"):
            whole_number(name, getattr(self, name))
        for name, kinds in (("hay", Hay), ("key_kind", Kind), ("value_kind", Kind)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}; got {getattr(self, name)!r}.")
        if self.queries > self.keys:
            raise ValueError(f"queries must be at most keys = {self.keys}; got {self.queries}.")

    def draft(self, rng: np.random.Generator, settings: TaskSettings) -> Draft:
        most = settings.length  # units: none has less than a token
        keys = draw_distinct(DRAWN[self.key_kind], self.keys, rng)
        drawn = draw_distinct(DRAWN[self.value_kind], self.keys * self.values, rng)
        values = {key: drawn[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        needles = [(key, self._needle(key, value)) for key in keys for value in values[key]]
        order = [needles[i] for i in rng.permutation(len(needles))]
        asked = [keys[i] for i in rng.permutation(len(keys))[: self.queries]]
        hay: Haystack
        if self.hay == "essay":
            hay = Essay.draw(settings.essay, rng)
        elif self.hay == "noise":
            hay = noise()
        else:
            most = settings.length // SHORTEST
            hay = self._other_needles(rng, most + 1, keys)
        hidden = [(depth, text) for depth, (_, text) in zip(draw_depths(rng, len(order)), order, strict=True)]
        first = next(depth for (depth, _), (key, _) in zip(hidden, order, strict=True) if key == asked[0])

        def text(units: int, tail: str) -> str:
            return self._question(hay.text(units, tail, hidden), asked)

        answers = tuple(value for key in asked for value in values[key])
        return Draft(text, hay.tails, self._prefix(asked), answers, least=0, most=most, depth=first)

    def _other_needles(self, rng: np.random.Generator, count: int, taken: list[str]) -> Lines:
        keys = draw_distinct(DRAWN[self.key_kind], count, rng, taken)
        lines = [self._needle(key, DRAWN[self.value_kind](rng)) for key in keys]
        return Lines(lines.__getitem__)

    @property
    def _one(self) -> str:
        return {"words": "word", "numbers": "number", "uuids": "code"}[self.value_kind]

    @property
    def _many(self) -> str:
        return self._one if self.queries * self.values == 1 else f"{self._one}s"

    def _needle(self, key: str, value: str) -> str:
        return f"One secret {self._one} of {key} is {value}."

    def _question(self, hay: str, asked: list[str]) -> str:
        is_single = self._many == self._one
        hidden = f"A secret {self._one} is" if is_single else f"Several secret {self._many} are"
        return (
            f"{hidden} hidden in the text below. Read it with care, as you are asked for {'it' if is_single else 'them'} at the end.\n"
            f"{hay}\nWhat {'is the' if is_single else 'are all the'} secret {self._many} of {_listed(asked)} in the text?"
        )

    def _prefix(self, asked: list[str]) -> str:
        return f"The secret {self._many} of {_listed(asked)} in the text {'is' if self._many == self._one else 'are'}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


NEEDLES = tuple(
    register(task)
    for task in (
        Needles("niah_single_1", "noise"),
        Needles("niah_single_2", "essay"),
        Needles("niah_single_3", "essay", value_kind="uuids"),
        Needles("niah_multikey_1", "essay", keys=4),
        Needles("niah_multikey_2", "needles"),
        Needles("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
        Needles("niah_multivalue", "essay", values=4),
        Needles("niah_multiquery", "essay", keys=4, queries=4),
    )
)

"""Variable tracking: chains of assignments hidden in a long text, all variables of one value asked for."""

import dataclasses
import itertools
import string

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.tasks.base import TaskSettings, register
from seer_jax.evaluate.tasks.ruler.fitting import Draft, DraftedTask
from seer_jax.evaluate.tasks.ruler.haystack import draw_depths, noise
from seer_jax.evaluate.tasks.ruler.words import draw_distinct

LETTERS = 5  # of a variable's name


@dataclasses.dataclass(frozen=True)
class VariableTracking(DraftedTask):
    """Variables that a value reached by assignment after assignment, scored by the share of them that the answer contains.

    Attributes:
      name: as a command line writes it.
      chains: values that are followed; the first one is asked for.
      hops: assignments from variable to variable in each chain.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    chains: int = 1
    hops: int = 4
    new_tokens: int = 30

    def __post_init__(self) -> None:
        for name in ("chains", "hops", "new_tokens"):
            whole_number(name, getattr(self, name))

    def draft(self, rng: np.random.Generator, settings: TaskSettings) -> Draft:
        most = settings.length
        links = self.hops + 1
        names = draw_distinct(_draw_name, self.chains * links, rng)
        values = draw_distinct(lambda rng: str(rng.integers(10**4, 10**5)), self.chains, rng)
        chains = [names[i * links : (i + 1) * links] for i in range(self.chains)]
        statements = [_statements(chain, value) for chain, value in zip(chains, values, strict=True)]
        # A random order that keeps that of each chain.
        turns = rng.permutation(np.repeat(np.arange(self.chains), links))
        remaining = [iter(chain) for chain in statements]
        hidden = list(zip(draw_depths(rng, len(turns)), (next(remaining[i]) for i in turns), strict=True))
        hay = noise()

        def text(units: int, tail: str) -> str:
            return (
                "Values are given to variables in the text below. Keep track of which variable has which value.\n\n"
                f"{hay.text(units, tail, hidden)}\n"
                f"Question: Which variables have the value {values[0]} in the text above? Name all of them."
            )

        prefix = f"Answer: In the text above, {links} variables have the value {values[0]}:"
        first = hidden[int(np.argmax(turns == 0))][0]
        return Draft(text, hay.tails, prefix, tuple(chains[0]), least=0, most=most, depth=first)


def _draw_name(rng: np.random.Generator) -> str:
    return "".join(string.ascii_uppercase[i] for i in rng.integers(0, 26, LETTERS))


def _statements(names: list[str], value: str) -> list[str]:
    """The value for the first variable, then each variable for the next one."""
    return [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ]


VARIABLES = register(VariableTracking("vt"))

"""Words that occur most often: common words of a numbered list, and made-up words whose counts follow Zipf's law."""

import dataclasses
import math
import string

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.tasks.base import TaskSettings, register
from seer_jax.evaluate.tasks.ruler.fitting import Draft, DraftedTask
from seer_jax.evaluate.tasks.ruler.words import draw_distinct, word_pool

SHORT_PROMPT = 4096  # tokens; shorter prompts repeat words less often
LEAST_ENTRY, USUAL_ENTRY = 3, 6  # tokens of a number, a point and a word
SPARE = 40  # words that fill a list up
ENTRIES = 5  # of a tail, at most

ZETA = math.pi**2 / 6  # of 2, the exponent of the counts
CODED_LETTERS = 6
NOISE = "..."  # stands for the most frequent word and does not count
LEAST_WORDS = 120  # for fewer the counts of the third and the fourth word may be equal
TOKENS_PER_WORD = 50  # of a prompt, for each word of its vocabulary


@dataclasses.dataclass(frozen=True)
class CommonWords(DraftedTask):
    """The ten words of a list that occur most often, after one example; scored by the share of them that the answer contains.

    From 4096 tokens on a common word occurs 30 times and any other at most 3 times, in shorter prompts 6 times and once.

    Attributes:
      name: as a command line writes it.
      common: words that are asked for.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    common: int = 10
    new_tokens: int = 120

    def __post_init__(self) -> None:
        for name in ("common", "new_tokens"):
            whole_number(name, getattr(self, name))

    def draft(self, rng: np.random.Generator, settings: TaskSettings) -> Draft:
        length = settings.length
        is_short = length < SHORT_PROMPT
        often, seldom = (6, 1) if is_short else (30, 3)
        shown, shown_often, shown_seldom = (20, 3, 1) if is_short else (40, 10, 3)
        most = length // LEAST_ENTRY
        first = shown + self.common + SPARE
        words = word_pool(first + most // seldom + 1)
        # Those that a prompt is likely to need are shuffled alone: rare pairs of words would tell the others apart.
        likely = min(first + length // USUAL_ENTRY // seldom, len(words))
        words = [*(words[i] for i in rng.permutation(likely)), *words[likely:]]
        example, words = words[:shown], words[shown:]
        common, spare, others = words[: self.common], words[self.common :][:SPARE], words[self.common + SPARE :]
        order = int(rng.integers(2**32))
        repeated = example[: self.common] * shown_often + example[self.common :] * shown_seldom
        shot = f"{self._asked(_numbered(repeated, order))} {self._prefix} {_numbered(example[: self.common])}\n"

        def entries(units: int) -> list[str]:
            return common * often + [other for other in others[: -(-units // seldom)] for _ in range(seldom)][:units]

        def text(units: int, tail: str) -> str:
            return shot + self._asked(_numbered(entries(units), order) + tail)

        def tails(units: int) -> list[str]:
            first = len(common) * often + units + 1
            chosen = [spare[i : i + count] for count in range(1, ENTRIES + 1) for i in range(0, SPARE - count, 2)]
            return [" " + _numbered(few, start=first) for few in chosen]

        return Draft(text, tails, self._prefix, tuple(common), least=0, most=most)

    def _asked(self, listed: str) -> str:
        return (
            "Some words of the numbered list below occur more often than the others. Remember those that occur most often.\n"
            f"{listed}\nQuestion: Which {self.common} words occur most often in the list above?"
        )

    @property
    def _prefix(self) -> str:
        return f"Answer: The {self.common} words that occur most often in the list are:"


def _numbered(words: list[str], order: int | None = None, *, start: int = 1) -> str:
    """A list on one line, in the order of a seed if there is one."""
    if order is not None:
        words = [words[i] for i in np.random.default_rng(order).permutation(len(words))]
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start))


@dataclasses.dataclass(frozen=True)
class FrequentWords(DraftedTask):
    """The three most frequent made-up words; scored by the share of them that the answer contains.

    The k-th word of the vocabulary occurs n / (zeta(2) k^2) times, rounded down; the first is noise. There is a word for every 50 tokens.

    Attributes:
      name: as a command line writes it.
      new_tokens: tokens that the answer has room for.
    """

    name: str
    new_tokens: int = 50

    def __post_init__(self) -> None:
        whole_number("new_tokens", self.new_tokens)

    def draft(self, rng: np.random.Generator, settings: TaskSettings) -> Draft:
        size = settings.length - self.new_tokens
        vocabulary = [NOISE, *draw_distinct(_draw_coded, max(size // TOKENS_PER_WORD, 5), rng)]
        order = int(rng.integers(2**32))
        shares = 1 / (ZETA * np.arange(1, len(vocabulary) + 1) ** 2)

        def text(units: int, tail: str) -> str:
            counts = (units * shares).astype(int)
            words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
            coded = " ".join(words[i] for i in np.random.default_rng(order).permutation(len(words)))
            return (
                "Count how often each coded word occurs in the coded text below, so that you can name the three most frequent ones.\n"
                f"{coded}{tail}\n"
                f"Question: Which three coded words occur most often in the text above? Leave out the dots '{NOISE}' and give no explanation."
            )

        def tails(units: int) -> list[str]:
            return [f" {NOISE}" * count for count in range(40)]

        prefix = "Answer: The three coded words that occur most often are:"
        return Draft(text, tails, prefix, tuple(vocabulary[1:4]), least=LEAST_WORDS, most=max(2 * size, LEAST_WORDS))


def _draw_coded(rng: np.random.Generator) -> str:
    return "".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, CODED_LETTERS))


WORD_COUNTS = register(CommonWords("cwe")), register(FrequentWords("fwe"))

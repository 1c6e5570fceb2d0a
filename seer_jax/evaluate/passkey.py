"""Pass keys: five digits stated somewhere in a long text and asked for at its end, the hardest test of attention with missing blocks."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from seer_jax import tiny_lm
from seer_jax.inference.text import Tokenizer

DIGITS = 5
DEPTHS = 9  # the key is stated at depth 0.1, 0.2 .. 0.9 in turn
ONE_WORD = 0.4  # share of names that are one word; the others are two


@dataclasses.dataclass(frozen=True)
class PassKeyPrompt:
    """A prompt and the answer that continues it.

    Attributes:
      name, answer: name of the pass key, and its five digits.
      depth: where the key is stated, as a share of the text before the question.
      tokens: the whole prompt, its answer included.
      answer_length: tokens of the answer, the last ones of the prompt.
    """

    name: str
    answer: str
    depth: float
    tokens: Int[np.ndarray, "T"]
    answer_length: int


def load_words(split: Literal["train", "eval"]) -> list[str]:
    """Lower-case words for the names of pass keys; no word is in both splits."""
    return json.loads((tiny_lm.path() / "words.json").read_text(encoding="utf-8"))[split]


def passkey_prompts(
    tokenizer: Tokenizer,
    text: Int[np.ndarray, "tokens"],
    words: Sequence[str],
    *,
    length: int,
    count: int,
    vocab_size: int,
    seed: int = 0,
    distractors: int = 0,
) -> list[PassKeyPrompt]:
    """Prompts of `length` tokens, their answers included: ordinary text, one line that states a pass key, a question as last line.

    For the bundled model the prompts equal those of its recipe token by token, so that its reference.json can be reproduced.

    Args:
      tokenizer: of the model; must encode a number as tokens of digits alone (that of every supported family does).
      text: tokens of the text that the key is hidden in.
      words: lower-case words for names, see `load_words`.
      length: tokens of a prompt with its answer.
      count: number of prompts.
      vocab_size: size of the vocabulary.
      seed: of names, digits and places.
      distractors: number of pass keys of other names, at random depths.

    Raises:
      ValueError: the text has fewer tokens than a prompt, no line ends in it, or a prompt has no room for the lines of the keys.
    """
    if not 0 <= distractors < length:
        raise ValueError(
            f"distractors must be at least 0 and fewer than the {length} tokens of a prompt; got {distractors}."
        )
    spelled = _spelled(tokenizer, vocab_size)
    writer = _PromptWriter(
        tokenizer=tokenizer,
        text=text,
        words=words,
        length=length,
        ends_line=_ends_line(spelled),
        is_digits=np.array([t.isascii() and t.isdigit() for t in spelled]),
    )
    rng = np.random.default_rng((seed, length, distractors))
    return [writer.write(i, distractors, rng) for i in range(count)]


def passkey_lines(name: str, value: str) -> tuple[str, str]:
    """The line that states a pass key, and the line that asks for it and answers."""
    return f"# The pass key of {name} is {value}.\n", f"# What is the pass key of {name}? It is {value}.\n"


def draw_name(rng: np.random.Generator, words: Sequence[str]) -> str:
    """A random name of one or two words."""

    def pick() -> str:
        return words[int(rng.integers(len(words)))]

    return pick() if rng.random() < ONE_WORD else f"{pick()}_{pick()}"


def draw_value(rng: np.random.Generator) -> str:
    """Five random digits."""
    return "".join(map(str, rng.integers(0, 10, DIGITS)))


def encode_line(tokenizer: Tokenizer, line: str) -> Int[np.ndarray, "n"]:
    """Tokens of a line within a text: without special tokens around it."""
    return np.array(tokenizer.encode(line, special_tokens=False))


def ends_of_lines(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, "V"]:
    """Mask of the tokens that end a line."""
    return _ends_line(_spelled(tokenizer, vocab_size))


def insert_lines(
    text: Int[np.ndarray, "tokens"], inserts: Iterable[tuple[int, Int[np.ndarray, "_"]]]
) -> Int[np.ndarray, "_"]:
    """The text with lines inserted before the tokens at the given places; lines of one place keep their order."""
    pieces, last = [], 0
    for place, line in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [text[last:place], line]
        last = place
    return np.concatenate([*pieces, text[last:]])


def _spelled(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    return [tokenizer.decode_known([i], skip_special_tokens=False) for i in range(vocab_size)]


def _ends_line(spelled: Sequence[str]) -> Bool[np.ndarray, "V"]:
    return np.array([t.endswith("\n") for t in spelled])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PromptWriter:
    """Writes prompts; the masks say which tokens end a line and which hold digits alone."""

    tokenizer: Tokenizer
    text: Int[np.ndarray, "tokens"]
    words: Sequence[str]
    length: int
    ends_line: Bool[np.ndarray, "V"]
    is_digits: Bool[np.ndarray, "V"]

    def write(self, number: int, distractors: int, rng: np.random.Generator) -> PassKeyPrompt:
        distinct: dict[str, None] = {}
        while len(distinct) < 1 + distractors:
            distinct[draw_name(rng, self.words)] = None
        names = list(distinct)
        values = [draw_value(rng) for _ in names]
        depths = [0.1 + 0.1 * (number % DEPTHS), *rng.random(distractors).tolist()]
        pairs = [passkey_lines(name, value) for name, value in zip(names, values, strict=True)]
        stated = [encode_line(self.tokenizer, statement) for statement, _ in pairs]
        question, answer = self._split_question(encode_line(self.tokenizer, pairs[0][1]))
        filler = self._filler(self.length - len(answer) - len(question) - sum(map(len, stated)), rng)
        places = np.flatnonzero(self.ends_line[filler]) + 1
        if not len(places):
            raise ValueError(
                f"The text around a pass key must have ends of lines between which the key is stated; got {len(filler)} tokens "
                f"without one, of length={self.length}. Use a greater length, or a text of shorter lines."
            )
        nearest = [int(places[np.argmin(abs(places - depth * (len(filler) + 1)))]) for depth in depths]
        # The filler may stop in the middle of a line; its line break makes the question start a new one.
        line_break = encode_line(self.tokenizer, "\n")[-1:]
        filled = insert_lines(filler, zip(nearest, stated, strict=True))
        tokens = np.concatenate([filled, line_break, question, answer]).astype(np.int32)
        assert len(tokens) == self.length
        return PassKeyPrompt(names[0], values[0], round(depths[0], 2), tokens, len(answer))

    def _filler(self, room: int, rng: np.random.Generator) -> Int[np.ndarray, "_"]:
        """Ordinary text from the start of a random line on, for a room of which a line break takes the last token."""
        lines = np.flatnonzero(self.ends_line[self.text]) + 1
        starts = lines[lines < len(self.text) - room - 1]
        if room < 1 or not len(starts):
            raise ValueError(
                f"The text of pass-key prompts must have several lines and length={self.length} tokens or more, and `length` must "
                f"leave room for the lines of the keys; got {len(self.text)} tokens and room for {room}. Use a longer text, "
                "another `length`, fewer `distractors`, or set `passkeys` to 0."
            )
        begin = int(rng.choice(starts))
        return self.text[begin : begin + room - 1]

    def _split_question(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The question up to the answer, and the answer's tokens."""
        places = np.flatnonzero(self.is_digits[line])
        if not len(places) or places[-1] - places[0] + 1 != len(places):
            raise ValueError(
                "The tokenizer of pass-key prompts must encode a number as tokens of digits alone; got one that does not. "
                "Set `passkeys` to 0, or use another model."
            )
        return line[: places[0]], line[places]

"""Pass keys: five digits stated somewhere in a long text and asked for at its end. The hardest thing to do with blocks missing."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from seer_jax.inference.text import Tokenizer

DIGITS = 5
DEPTHS = 9  # the key stands at depth 0.1, 0.2 .. 0.9 in turn
ONE_WORD = 0.4  # share of names that are one word; the others are two


@dataclasses.dataclass(frozen=True)
class PassKeyPrompt:
    """A prompt and the answer that continues it.

    Attributes:
      name, answer: what is asked for, and its five digits.
      depth: where the key is stated, as a share of the text before the question.
      tokens: the whole prompt, its answer included.
      answer_length: how many tokens at the end are the answer.
    """

    name: str
    answer: str
    depth: float
    tokens: Int[np.ndarray, "T"]
    answer_length: int


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

    For the bundled model the prompts are those of its recipe, token by token: the figures in its reference.json can be checked.

    Args:
      tokenizer: of the model; must spell a number as tokens of digits alone (that of every supported family does).
      text: what the key is hidden in, tokens of `tokenizer`.
      words: lower-case words that names are made of.
      length: of a prompt with its answer, tokens.
      count: prompts.
      vocab_size: tokens of the vocabulary.
      seed: of names, digits and places.
      distractors: pass keys of other names, at random depths.

    Raises:
      ValueError: the text has fewer tokens than a prompt, or no line ends in it.
    """
    ends_line = ends_of_lines(tokenizer, vocab_size)
    is_digits = np.array([t.isascii() and t.isdigit() for t in _spelled(tokenizer, vocab_size)])
    rng = np.random.default_rng((seed, length, distractors))
    lines = np.flatnonzero(ends_line[text]) + 1
    return [
        _prompt(tokenizer, text, words, lines, ends_line, is_digits, length, i, distractors, rng) for i in range(count)
    ]


def passkey_lines(name: str, value: str) -> tuple[str, str]:
    """The line that states a pass key, and the line that asks for it and answers."""
    return f"# The pass key of {name} is {value}.\n", f"# What is the pass key of {name}? It is {value}.\n"


def secret_name(rng: np.random.Generator, words: Sequence[str]) -> str:
    """One word, or two of them."""

    def pick() -> str:
        return words[int(rng.integers(len(words)))]

    return pick() if rng.random() < ONE_WORD else f"{pick()}_{pick()}"


def secret_value(rng: np.random.Generator) -> str:
    """Five digits."""
    return "".join(map(str, rng.integers(0, 10, DIGITS)))


def encode_line(tokenizer: Tokenizer, line: str) -> Int[np.ndarray, "n"]:
    """Tokens of a line within a text: no special tokens around it."""
    return np.array(tokenizer.encode(line, special_tokens=False))


def ends_of_lines(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, "V"]:
    """Which tokens end a line."""
    return np.array([t.endswith("\n") for t in _spelled(tokenizer, vocab_size)])


def _spelled(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in range(vocab_size)]


def _prompt(
    tokenizer: Tokenizer,
    text: np.ndarray,
    words: Sequence[str],
    lines: np.ndarray,
    ends_line: np.ndarray,
    is_digits: np.ndarray,
    length: int,
    number: int,
    distractors: int,
    rng: np.random.Generator,
) -> PassKeyPrompt:
    names: list[str] = []
    while len(names) < 1 + distractors:
        if (name := secret_name(rng, words)) not in names:
            names.append(name)
    values = [secret_value(rng) for _ in names]
    depths = [0.1 + 0.1 * (number % DEPTHS), *rng.random(distractors).tolist()]
    pairs = [passkey_lines(name, value) for name, value in zip(names, values, strict=True)]
    stated = [encode_line(tokenizer, statement) for statement, _ in pairs]
    question, answer = _split_question(encode_line(tokenizer, pairs[0][1]), is_digits)
    room = length - len(answer) - len(question) - sum(map(len, stated))
    starts = lines[lines < len(text) - room - 1]
    if room < 1 or not len(starts):
        raise ValueError(
            f"A pass key is hidden in ordinary text: expected length={length} tokens or more of it (in several lines), and a "
            f"length that leaves room for the key's lines; got {len(text)} tokens and room for {room}. Give a longer text, or "
            "another length."
        )
    begin = int(rng.choice(starts))
    filler = text[begin : begin + room]
    places = np.flatnonzero(ends_line[filler[:-1]]) + 1
    inserts = [(int(places[np.argmin(abs(places - depth * room))]), s) for depth, s in zip(depths, stated, strict=True)]
    pieces, last = [], 0
    for place, line in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [filler[last:place], line]
        last = place
    # The text may stop in the middle of a line: the question starts a line of its own all the same.
    pieces += [filler[last:-1], encode_line(tokenizer, "\n")[-1:], question, answer]
    tokens = np.concatenate(pieces).astype(np.int32)
    assert len(tokens) == length
    return PassKeyPrompt(names[0], values[0], round(depths[0], 2), tokens, len(answer))


def _split_question(line: np.ndarray, is_digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The question up to the answer, and the answer's tokens."""
    places = np.flatnonzero(is_digits[line])
    if not len(places) or places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            "Pass keys need a tokenizer that spells a number as tokens of digits alone; this one does not."
        )
    return line[: places[0]], line[places]

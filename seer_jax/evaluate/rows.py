"""The rows of an evaluation: windows of held-out text, and pass-key prompts cut from the same text."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from seer_jax.evaluate.passkey import PassKeyPrompt, load_words, passkey_prompts
from seer_jax.inference.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Windows of text and pass-key prompts, all of the same length.

    Attributes:
      windows: for perplexity.
      prompts: for retrieval.
      decoded: tokens at the end of each prompt that are appended one at a time to measure decoding, after dense attention over
        the tokens before them. They include the answer; all of them but the first are scored. Windows are decoded whole.
    """

    windows: Int[np.ndarray, "n T"]
    prompts: Sequence[PassKeyPrompt]
    decoded: int = 64

    def __post_init__(self) -> None:
        if np.ndim(self.windows) != 2 or not np.issubdtype(np.asarray(self.windows).dtype, np.integer):
            raise ValueError(
                f"windows must be integers [n, T]; got {np.asarray(self.windows).dtype} {np.shape(self.windows)}."
            )
        if wrong := [np.shape(p.tokens) for p in self.prompts if np.shape(p.tokens) != (self.length,)]:
            raise ValueError(f"prompts must have the {self.length} tokens of the windows; got one of shape {wrong[0]}.")
        if not 2 <= self.decoded < self.length:
            raise ValueError(
                f"decoded must be at least 2 and less than the {self.length} tokens of a row; got {self.decoded}."
            )
        longest = max((p.answer_length for p in self.prompts), default=0)
        if self.decoded <= longest:
            raise ValueError(
                f"decoded must be greater than the {longest} tokens of the longest answer; got {self.decoded}."
            )

    @property
    def length(self) -> int:
        """T, tokens per row."""
        return self.windows.shape[1]

    @property
    def prompt_tokens(self) -> Int[np.ndarray, "prompts T"]:
        """Of all prompts."""
        return np.stack([p.tokens for p in self.prompts]) if self.prompts else self.windows[:0]


def make_rows(
    tokenizer: Tokenizer,
    text: str,
    *,
    vocab_size: int,
    length: int = 4096,
    windows: int = 8,
    passkeys: int = 18,
    distractors: int = 0,
    decoded: int = 64,
    seed: int = 0,
) -> EvalRows:
    """Cuts windows and pass-key prompts from a text.

    Args:
      tokenizer: of the model.
      text: held-out text, for example `tiny_lm.eval_text()`.
      vocab_size: size of the vocabulary.
      length: T, tokens per row.
      windows: number of windows, spread evenly over the text; fewer where the text has fewer.
      passkeys, distractors, seed: number of prompts, further pass keys in each, and their seed; see `passkey_prompts`.
      decoded: see `EvalRows`.

    Raises:
      ValueError: the text is shorter than a row, or a row too short for the lines of its pass keys.
    """
    tokens = np.array(tokenizer.encode(text, special_tokens=False), np.int32)
    cut = text_windows(tokens, length, windows)
    prompts = passkey_prompts(
        tokenizer,
        tokens,
        load_words("eval"),
        length=length,
        count=passkeys,
        vocab_size=vocab_size,
        seed=seed,
        distractors=distractors,
    )
    return EvalRows(cut, prompts, decoded)


def text_windows(text: Int[np.ndarray, "tokens"], length: int, count: int | None = None) -> Int[np.ndarray, "n length"]:
    """Consecutive windows from token 0 on; a last, shorter one is dropped.

    Args:
      text: tokens.
      length: tokens per window; all but the first are scored.
      count: number of windows, spread evenly over the text; None or more than there are: all.

    Raises:
      ValueError: the text is shorter than a window.
    """
    if length < 2 or (count is not None and count < 1):
        raise ValueError(
            f"Windows must be at least one, of at least 2 tokens, of which all but the first are scored; got {count} of {length}."
        )
    windows = text[: len(text) // length * length].reshape(-1, length)
    if not len(windows):
        raise ValueError(
            f"The text must fill at least one window of {length} tokens; got {len(text)} tokens. Use a longer text or "
            "a smaller `length`."
        )
    if count is None or count >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]

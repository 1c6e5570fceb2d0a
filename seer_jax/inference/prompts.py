"""Prompts as arrays: padding of ragged ones, and the checks that need their values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

Prompts = Int[Array, "B T"] | np.ndarray | Sequence[Sequence[int]]
Lengths = Int[Array, "B"] | np.ndarray | Sequence[int]

BUCKET = 64  # tokens
BUCKETS_PER_OCTAVE = 8


def bucket(size: int) -> int:
    """The size that a program is compiled for in place of `size`, so that similar sizes share one program.

    Multiples of 64 up to 512, above that eighths of the power of two below: at most an eighth larger than `size`.

    >>> [bucket(n) for n in (1, 64, 65, 512, 1025, 33000)]
    [64, 64, 128, 512, 1152, 36864]
    """
    size = int(size)  # NumPy's integers have no bit_length
    step = max(BUCKET, 2 ** ((size - 1).bit_length() - 1) // BUCKETS_PER_OCTAVE)
    return -(-size // step) * step


def pad_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], *, multiple_of: int = 1
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Makes right-padded tokens and their lengths from prompts of different lengths.

    >>> tokens, lengths = pad_prompts([[5, 6, 7], [8]])
    >>> tokens.tolist(), lengths.tolist()
    ([[5, 6, 7], [8, 0, 0]], [3, 1])

    Args:
      prompts: token ids, at least one in each prompt.
      multiple_of: T is rounded up to a multiple of this, so that prompts of similar lengths share one compiled program.

    Returns:
      (tokens int32 [B, T], padded with 0; lengths int32 [B]).

    Raises:
      ValueError: there is no prompt, one is empty, or one holds anything but integers.
    """
    if not len(prompts):
        raise ValueError("Generation needs at least one prompt; got none.")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1 token; got {multiple_of}.")
    rows = [np.asarray(prompt) for prompt in prompts]
    for number, row in enumerate(rows):
        if not row.size:
            raise ValueError(
                f"A prompt must have at least one token; prompt {number} is empty. Start it with a BOS token."
            )
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"A prompt must be a list of integers; prompt {number} is {row.dtype} {row.shape}.")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), -(-int(lengths.max()) // multiple_of) * multiple_of), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    return tokens, lengths


def check_prompts(
    tokens: Prompts, lengths: Lengths | None, *, vocab_size: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Checks prompts by their values and returns tokens, padded with 0, and lengths.

    Raises:
      ValueError: shapes, dtypes or lengths are wrong, or a token is not in the vocabulary.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ValueError(
            "tokens must be one integer array [B, T]; got rows of different lengths. "
            "Pad them first: tokens, lengths = pad_prompts(rows)."
        ) from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
        raise ValueError(
            f"tokens must be integers [B, T] with B, T >= 1; got {array.dtype} {array.shape}. "
            "A single prompt is a batch of one row; ragged ones go through pad_prompts."
        )
    batch, width = array.shape
    counts = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if counts.shape != (batch,) or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"lengths must be integers [B] with B = {batch}; got {counts.dtype} {counts.shape}.")
    if counts.min() < 1 or counts.max() > width:
        row = int(np.argmax((counts < 1) | (counts > width)))
        raise ValueError(f"Each prompt must have 1 to T = {width} tokens; row {row} has length {counts[row]}.")
    counted = np.arange(width) < counts[:, None]
    wrong = counted & ((array < 0) | (array >= vocab_size))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"Tokens must lie in [0, {vocab_size}), the model's vocabulary; row {row} has {array[row, column]} at position "
            f"{column}. Use the tokenizer that belongs to the model."
        )
    return np.where(counted, array, 0).astype(np.int32), counts.astype(np.int32)


def check_prompt(tokens: Any, what: str, *, vocab_size: int) -> list[int]:
    """Checks one prompt by its values and returns it as a list.

    Args:
      tokens: integers, at least one.
      what: the subject of messages, such as "A prompt".
      vocab_size: see `check_prompts`.

    Raises:
      ValueError: it is no list of integers, is empty, or has a token that is not in the vocabulary.
    """
    try:
        row = np.asarray(tokens)
    except ValueError:
        raise ValueError(
            f"{what} must be one list of integers; got lists of different lengths. Give each by itself."
        ) from None
    if not row.size:
        raise ValueError(f"{what} must have at least one token; got none. Start it with a BOS token.")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"{what} must be one list of integers; got {row.dtype} of shape {row.shape}. Give each list by itself, as integers."
        )
    if ((row < 0) | (row >= vocab_size)).any():
        place = int(np.argmax((row < 0) | (row >= vocab_size)))
        raise ValueError(
            f"Tokens must lie in [0, {vocab_size}), the model's vocabulary; {what[0].lower()}{what[1:]} has {row[place]} at position {place}. "
            "Use the tokenizer that belongs to the model."
        )
    return row.tolist()

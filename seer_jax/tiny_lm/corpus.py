"""Text to teach the bundled model's gates with: Python's own library, with pass keys woven in."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from seer_jax import tiny_lm
from seer_jax.evaluate.passkey import encode_line, ends_of_lines, passkey_lines, secret_name, secret_value
from seer_jax.inference.text import Tokenizer

# The evaluation text is cut from these modules of the standard library, so nothing here may be. The others are no ordinary code.
HELD_OUT = ("argparse.py", "asyncio", "email", "http", "logging", "unittest", "xml", "json")
LEFT_OUT = ("test", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages")
END_OF_TEXT = "<|endoftext|>"
LAST_START = 0.9  # keys are stated before this share of a row


def training_rows(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    length: int,
    count: int,
    keys: int,
    questions: int,
    seed: int = 0,
    library: Path | None = None,
) -> Int[np.ndarray, "count length"]:
    """Rows of source code of the running interpreter's standard library; each states pass keys and asks for them again.

    The names of the keys are made of words that no evaluation prompt uses.

    Args:
      tokenizer: of the bundled model.
      vocab_size: tokens of its vocabulary.
      length: tokens per row.
      count: rows.
      keys: pass keys per row, at random places.
      questions: how often each is asked for, at random later places.
      seed: of files, keys and places.
      library: folder of the standard library; None: the running interpreter's.

    Raises:
      ValueError: the library holds too little source code, or the pass keys fill the rows.
    """
    rng = np.random.default_rng(seed)
    words = json.loads((tiny_lm.path() / "words.json").read_text())["train"]
    ends_line = ends_of_lines(tokenizer, vocab_size)
    stream = _stream(tokenizer, library or Path(sysconfig.get_path("stdlib")), rng, length * count)
    lines = [_pass_key_lines(tokenizer, rng, words, keys, questions) for _ in range(count)]
    rows = zip(stream.reshape(count, length), lines, strict=True)
    return np.stack([_weave(row, inserts, ends_line) for row, inserts in rows]).astype(np.int32)


def source_files(library: Path) -> list[Path]:
    """The library's source files that may be learnt from, sorted."""
    paths = sorted(library.rglob("*.py"))
    return [p for p in paths if p.relative_to(library).parts[0] not in (*HELD_OUT, *LEFT_OUT)]


def _stream(tokenizer: Tokenizer, library: Path, rng: np.random.Generator, size: int) -> Int[np.ndarray, "size"]:
    """Tokens of whole files in random order, each after an end-of-text mark; as many files as it takes."""
    files = source_files(library)
    parts, have = [], 0
    for number in rng.permutation(len(files)):
        parts.append(encode_line(tokenizer, END_OF_TEXT + files[number].read_text(encoding="utf-8", errors="replace")))
        have += len(parts[-1])
        if have >= size:
            return np.concatenate(parts)[:size]
    raise ValueError(
        f"Gates are taught with the standard library's source: expected {size} tokens of it in {library}; got {have}. Use an "
        "interpreter that comes with its library's source, or fewer or shorter rows."
    )


_Insert = tuple[float, Int[np.ndarray, "_"]]  # where in a row, from 0 to 1, and the tokens


def _pass_key_lines(
    tokenizer: Tokenizer, rng: np.random.Generator, words: list[str], keys: int, questions: int
) -> list[_Insert]:
    def lines() -> Iterator[_Insert]:
        for _ in range(keys):
            stated, asked = (
                encode_line(tokenizer, x) for x in passkey_lines(secret_name(rng, words), secret_value(rng))
            )
            place = LAST_START * rng.random()
            yield place, stated
            for _ in range(questions):
                yield place + (1 - place) * rng.random(), asked

    return sorted(lines(), key=lambda insert: insert[0])


def _weave(row: Int[np.ndarray, "T"], inserts: list[_Insert], ends_line: Bool[np.ndarray, "V"]) -> Int[np.ndarray, "T"]:
    """The row with lines put in between its own; what no longer fits is cut off its end."""
    room = len(row) - sum(len(line) for _, line in inserts)
    if room < len(row) // 4:
        raise ValueError(
            f"Pass keys leave a quarter of a row to ordinary text; got {len(row) - room} of {len(row)} tokens."
        )
    places = np.append(np.flatnonzero(ends_line[row[:room]]) + 1, room)
    pieces, last = [], 0
    for share, line in inserts:
        place = places[int(share * len(places))]
        pieces += [row[last:place], line]
        last = place
    return np.concatenate([*pieces, row[last:room]])

"""Text for the gates of the bundled model, from Python's standard library: training rows with pass keys, and held-out text to calibrate on.

    python -m seer_jax.tiny_lm.corpus heldout.txt

writes the held-out text of the running interpreter's standard library.
"""

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from seer_jax import tiny_lm
from seer_jax.checks import listed
from seer_jax.evaluate.passkey import (
    draw_name,
    draw_value,
    encode_line,
    ends_of_lines,
    insert_lines,
    load_words,
    passkey_lines,
)
from seer_jax.inference.text import Tokenizer

# Neither the model nor its gates were trained on these; the evaluation text is a quarter of their files.
HELD_OUT = ("argparse.py", "asyncio", "email", "http", "logging", "unittest", "xml", "json")
NO_ORDINARY_CODE = ("test", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages")
END_OF_TEXT = "<|endoftext|>"
LAST_START = 0.9  # keys are stated before this share of a row
LONG_LINE = 40  # characters; shorter lines are alike in many files
MOST_SHARED = 0.2  # long lines that a held-out file may share with the evaluation text


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

    The names of the keys consist of words that no evaluation prompt uses.

    Args:
      tokenizer: of the bundled model.
      vocab_size: size of its vocabulary.
      length: tokens per row.
      count: number of rows.
      keys: pass keys per row, at random places.
      questions: questions per key, at random later places.
      seed: of files, keys and places.
      library: folder of the standard library; None: the running interpreter's.

    Raises:
      ValueError: the library holds too little source code, or the pass keys fill the rows.
    """
    rng = np.random.default_rng(seed)
    words = load_words("train")
    ends_line = ends_of_lines(tokenizer, vocab_size)
    stream = _stream(tokenizer, library or Path(sysconfig.get_path("stdlib")), rng, length * count)
    lines = [_pass_key_lines(tokenizer, rng, words, keys, questions) for _ in range(count)]
    rows = zip(stream.reshape(count, length), lines, strict=True)
    return np.stack([_insert(row, inserts, ends_line) for row, inserts in rows]).astype(np.int32)


def source_files(library: Path) -> list[Path]:
    """The library's source files for training, sorted."""
    paths = sorted(library.rglob("*.py"))
    return [p for p in paths if p.relative_to(library).parts[0] not in (*HELD_OUT, *NO_ORDINARY_CODE)]


def held_out_text(library: Path | None = None) -> str:
    """Held-out files that the evaluation text does not contain, each after an end-of-text mark: for calibration.

    Args:
      library: folder of the standard library; None: the running interpreter's.

    Raises:
      ValueError: the library holds no source code.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    scored, texts = set(_long_lines(tiny_lm.eval_text())), []
    found = [path for name in HELD_OUT for path in (library / name, *library.joinpath(name).rglob("*.py"))]
    for path in sorted(path for path in found if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = _long_lines(text)
        if lines and sum(line in scored for line in lines) <= MOST_SHARED * len(lines):
            texts.append(END_OF_TEXT + text)
    if not texts:
        raise ValueError(
            f"The standard library in {library} must have the source code of {listed(HELD_OUT)}; got none. Use an interpreter that "
            "comes with its library's source."
        )
    return "".join(texts)


def _long_lines(text: str) -> list[str]:
    return [stripped for line in text.splitlines() if len(stripped := line.strip()) >= LONG_LINE]


def _stream(tokenizer: Tokenizer, library: Path, rng: np.random.Generator, size: int) -> Int[np.ndarray, "size"]:
    """`size` tokens of whole files in random order, each after an end-of-text mark."""
    files = source_files(library)
    parts, have = [], 0
    for number in rng.permutation(len(files)):
        parts.append(encode_line(tokenizer, END_OF_TEXT + files[number].read_text(encoding="utf-8", errors="replace")))
        have += len(parts[-1])
        if have >= size:
            return np.concatenate(parts)[:size]
    raise ValueError(
        f"The standard library in {library} must have source code of at least {size} tokens; got {have}. Use an interpreter "
        "that comes with its library's source, or fewer or shorter rows."
    )


_Insert = tuple[float, Int[np.ndarray, "_"]]  # place in a row, from 0 to 1, and the tokens of a line


def _pass_key_lines(
    tokenizer: Tokenizer, rng: np.random.Generator, words: Sequence[str], keys: int, questions: int
) -> list[_Insert]:
    """Lines that state and ask for pass keys, in the order of their places."""

    def lines() -> Iterator[_Insert]:
        for _ in range(keys):
            stated, asked = (encode_line(tokenizer, x) for x in passkey_lines(draw_name(rng, words), draw_value(rng)))
            place = LAST_START * rng.random()
            yield place, stated
            for _ in range(questions):
                yield place + (1 - place) * rng.random(), asked

    return sorted(lines(), key=lambda insert: insert[0])


def _insert(
    row: Int[np.ndarray, "T"], inserts: Sequence[_Insert], ends_line: Bool[np.ndarray, "V"]
) -> Int[np.ndarray, "T"]:
    """The row with lines inserted between its own, cut to its length."""
    room = len(row) - sum(len(line) for _, line in inserts)
    if room < len(row) // 4:
        raise ValueError(
            f"Pass keys must leave a quarter of a row of {len(row)} tokens to ordinary text; they take {len(row) - room}. "
            "Use fewer keys or questions, or longer rows."
        )
    places = np.append(np.flatnonzero(ends_line[row[:room]]) + 1, room)
    return insert_lines(row[:room], [(int(places[int(share * len(places))]), line) for share, line in inserts])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(held_out_text(), encoding="utf-8")

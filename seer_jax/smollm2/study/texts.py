"""Training texts made of the study's own text and of the interpreter's source code, offline and by a seed."""

import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from seer_jax.evaluate.passkey import draw_name, draw_value, load_words, passkey_lines
from seer_jax.outputs import write_text
from seer_jax.smollm2.study.variants import Text
from seer_jax.tiny_lm.corpus import source_files

CODE_EVERY = 4  # of so many documents, one is a source file
KEYS, QUESTIONS = 4, 2  # pass keys of a document, and how often each is asked for


def write_mix(text: Text, pages: Iterable[str], folder: Path, *, characters: int, seed: int) -> Path:
    """A JSONL file with a text, made of pages in their order; one that is there is kept.

    Args:
      text: which text.
      pages: of documentation.
      folder: of the file.
      characters: of the text, at least, as far as there are pages.
      seed: of the order of source files, and of pass keys and their places.

    Raises:
      ValueError: the interpreter has no source code to mix in.
    """
    path = folder / f"{text}-{characters}-{seed}.jsonl"
    if not path.exists():
        rng = np.random.default_rng(seed)
        documents = _with_code(pages, rng) if text is Text.CODE else _with_pass_keys(pages, rng)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps({"text": d}) + "\n" for d in _up_to(documents, characters)))
    return path


def _up_to(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents that have so many characters together."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def _with_code(pages: Iterable[str], rng: np.random.Generator) -> Iterator[str]:
    """Pages with source files of the standard library between them, as long as there are any."""
    files = source_files(library := Path(sysconfig.get_path("stdlib")))
    if not files:
        raise ValueError(
            f"The standard library in {library} must have its source code, to train on code; got none. Use an interpreter that has it, or leave out with-code."
        )
    order = iter(rng.permutation(len(files)).tolist())
    for number, page in enumerate(pages, start=1):
        yield page
        if number % (CODE_EVERY - 1) == 0 and (place := next(order, None)) is not None:
            yield files[place].read_text(encoding="utf-8", errors="replace")


def _with_pass_keys(pages: Iterable[str], rng: np.random.Generator, *, least: int = 24_000) -> Iterator[str]:
    """Documents of at least `least` characters, several pages each, that state pass keys and ask for them later on."""
    words, pages = load_words("train"), iter(pages)
    while chosen := list(_up_to(pages, least)):
        lines = list(itertools.chain.from_iterable(page.splitlines(keepends=True) for page in chosen))
        inserts: list[tuple[float, str]] = []
        for _ in range(KEYS):
            stated, asked = passkey_lines(draw_name(rng, words), draw_value(rng))
            place = 0.9 * rng.random()
            inserts += [(place, stated), *((place + (1 - place) * rng.random(), asked) for _ in range(QUESTIONS))]
        count = len(lines)
        for share, line in sorted(inserts, reverse=True):  # from the end, so that a question stays behind its statement
            lines.insert(int(share * count), line)
        yield "".join(lines)

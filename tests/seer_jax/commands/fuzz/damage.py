"""Damaged files and random options for the command line: what a case is, and how it is run and judged.

A case is made from its number alone, so that a failure can be repeated: `run_case(world, number)`.
"""

import contextlib
import dataclasses
import io
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seer_jax.commands import main as cli

SECONDS = 120  # a case that takes longer hangs
MEMORY = 2**30  # bytes that a case may add to the peak of the process

HUGE = 10**400
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        2**31,
        2**63,
        2**70,
        HUGE,
        -HUGE,
        0.5,
        1.5,
        -0.0,
        1e308,
        1e-308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "-1",
        "1e3",
        "[a, b]",
        "[/bold]",
        "\x1b[31m",
        "é\u202e",
        "../..",
        "/",
        "\ud800",
        "a" * 5000,
        "{{",
        "{% for %}",
        "\x00",
    ),
    *([], {}, [[]], [None], [1, "x"], {"": None}, {"name": "x"}, [0] * 1000, {"a": {"b": {"c": []}}}),
)


class Hang(BaseException):
    """A case took too long. Not an Exception, which commands could take for one of theirs."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case did.

    Attributes:
      words: the command line.
      change: what was damaged, and how.
      wrong: what it must not have done; None: it was fine.
    """

    words: list[str]
    change: str
    wrong: str | None


def run_case(words: list[str], change: str) -> Outcome:
    """Runs a command line in this process and judges what came of it."""
    out, err = io.StringIO(), io.StringIO()
    before = _peak()
    wrong = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm():
            code = cli.main(words)
    except SystemExit as end:
        code = end.code
    except Hang:
        return Outcome(words, change, f"more than {SECONDS} s")
    except BaseException as error:  # whatever it is, a user would see a traceback
        return Outcome(words, change, f"{type(error).__name__}: {str(error)[:500]}")
    lines = err.getvalue().splitlines()
    if code not in (0, 1, 2):
        wrong = f"exit code {code}"
    elif code and (not lines or not lines[-1].startswith("seer-jax")) and "verify" not in words:
        wrong = f"exit code {code} and no line: {lines[-3:]}"
    elif any("Traceback" in line for line in lines):
        wrong = "a traceback on standard error"
    elif _peak() - before > MEMORY:
        wrong = f"{(_peak() - before) / 2**30:.1f} GiB more"
    return Outcome(words, change, wrong)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, rng: random.Random) -> str:
    """Changes a file in a random way; returns a word for how."""
    kinds: list[Callable[[Path, random.Random], None]] = [_truncate, _flip, _insert, _remove, _replace, _nest]
    if path.suffix in (".json", ".jsonl"):
        kinds = [_change_json] * 12 + kinds
    if path.suffix == ".safetensors":
        kinds = [_change_header] * 12 + kinds
    if path.suffix in (".yaml", ".jinja", ".txt"):
        kinds = [_change_text] * 8 + kinds
    kind = rng.choice(kinds)
    kind(path, rng)
    return kind.__name__.strip("_")


def _truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, rng.randint(0, len(data)), max(len(data) - 1, 0)))])


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8, 100)) if data else 0):
        # Most of what can go wrong is at the start of a file.
        data[rng.randrange(rng.choice((min(len(data), 300), len(data))))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _insert(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randint(0, min(len(data), rng.choice((16, 300, len(data)))))
    path.write_bytes(data[:at] + rng.choice((b"\0", b"\xff\xfe", rng.randbytes(40), b"\n\n", b'"')) + data[at:])


def _remove(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randint(0, len(data))
    path.write_bytes(data[:at] + data[at + rng.choice((1, 8, 100)) :])


def _replace(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice((b"", b"null", b"[]", b"{}", b'"x"', b"\x80\x02}.", b"PK\x03\x04", rng.randbytes(200))))


def _nest(path: Path, rng: random.Random) -> None:
    text = rng.choice((b"[", b'{"a":')) * 100_000
    if path.suffix == ".safetensors":
        text = len(text).to_bytes(8, "little") + text
    path.write_bytes(text)


def _change_text(path: Path, rng: random.Random) -> None:
    words = path.read_text(encoding="utf-8").split(" ")
    words[rng.randrange(len(words))] = str(rng.choice(VALUES))[:6000]
    path.write_text(" ".join(words), encoding="utf-8", errors="replace")


def _change_json(path: Path, rng: random.Random) -> None:
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(_changed(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text(json.dumps(_changed(json.loads(path.read_text(encoding="utf-8")), rng)), encoding="utf-8")


def _change_header(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(_changed(json.loads(data[8 : 8 + length]), rng)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _changed(value: Any, rng: random.Random) -> Any:
    """The value of a JSON file with one random part of it replaced, removed, renamed or added."""
    places = [(), *_places(value)]
    # Files with long lists have most of their places there; few of them differ.
    few = [place for place in places if len(place) <= 2]
    *inner, last = rng.choice(few if rng.random() < 0.7 else places) or ("",)
    if not inner and last == "":
        return rng.choice(VALUES)
    holder = value
    for key in inner:
        holder = holder[key]
    action = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if action == "remove":
        del holder[last]
    elif action in ("rename", "add") and isinstance(holder, dict):
        holder[rng.choice(("", "x", f"{last}_", "rope_scaling", "quantization_config", "seer_jax_policy"))] = (
            holder.pop(last) if action == "rename" else rng.choice(VALUES)
        )
    else:
        holder[last] = rng.choice(VALUES)
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if len(path) < 4:
            yield from _places(inner, (*path, key))


def copy_tree(source: Path, target: Path) -> None:
    """A copy of a world that a case may damage."""
    for old in target.iterdir():  # the folder itself stays: it may be the working directory
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(source, target, dirs_exist_ok=True)

"""Objects of a JSON or JSONL file with the place of each, for messages."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seer_jax.text_files import parse_json, read_text

SUFFIX = ".jsonl"


def read_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSONL file, one a line; empty lines count in numbers alone.

    Yields:
      (place, such as "texts.jsonl:3"; the object).

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: a line is no JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(parse_json(line, f"{place}, a line of a JSONL file,"), place)


def read_value(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it is no JSON.
    """
    return parse_json(_text(path), str(path))


def read_list(path: Path, values: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a list that a JSON file holds, as from `read_lines`."""
    for number, value in enumerate(values):
        yield f"{path}, entry {number}", _object(value, f"{path}, entry {number}")


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"tasks must name files that are there; got {str(path)!r}, which is not. Check the path."
        )
    return read_text(path)


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must hold a JSON object; got {str(value)[:60]!r}.")
    return value

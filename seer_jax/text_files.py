"""Text files: UTF-8 and JSON, or a refusal that names file, place and remedy."""

import json
import os
from pathlib import Path
from typing import Any

_LARGEST = 10**300  # of whole numbers in JSON, below the largest float

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte order mark, and with line ends as \\n.

    Raises:
      ValueError: the file holds something else.
      OSError: it can't be read.
    """
    return decode_text(Path(path).read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def decode_text(data: bytes, place: str, *, name: str | None = None) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Args:
      data: bytes of a file, or of a part of it.
      place: where they come from, for messages.
      name: of the file, for the remedy; None: `place`.

    Raises:
      ValueError: they are no UTF-8 text.
    """
    name = place if name is None else name
    if data.startswith(_UTF16):
        raise ValueError(f"{place} must be UTF-8 text; it is UTF-16. {_convert(name, 'UTF-16')}")
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{place} must be UTF-8 text; got a zero byte at position {at}, as binary files and UTF-16 have. Leave the file out, or "
            "convert it to UTF-8."
        )
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + len(_BOM) * data.startswith(_BOM)
        line = data.count(b"\n", 0, at) + 1
        where = f"position {at}" + (f", line {line}" if line > 1 else "")
        raise ValueError(
            f"{place} must be UTF-8 text; byte 0x{data[at]:02x} at {where} is not. {_convert(name, 'LATIN1')} A binary file must be left "
            "out."
        ) from None


def parse_json(text: str | bytes, place: str) -> Any:
    """The value of a JSON text.

    Args:
      text: as it is in the file.
      place: where it comes from, for messages.

    Raises:
      ValueError: it is no JSON, is nested too deeply, or has a whole number beyond 1e300, which no float holds.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"{place} must hold JSON of a few levels; it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{place} must hold JSON; {error}.") from error


def _whole_number(text: str) -> int:
    if len(text) > 400 or abs(int(text)) > _LARGEST:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _convert(name: str, encoding: str) -> str:
    kind = "Convert it" if encoding == "UTF-16" else "Where it is Latin-1, convert it"
    return f"{kind}: iconv -f {encoding} -t UTF-8 '{name}' > NEW."

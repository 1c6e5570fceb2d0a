"""The header of a GGUF file: metadata and the table of tensors, checked before anything is trusted.

`gguf.GGUFReader` makes one array object per element of every list: seconds and hundreds of MB for a vocabulary, and without bound for a
damaged count. Here a count is compared with the bytes that are left before it is followed.
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ITEMS = 2**22  # of a list; vocabularies have a sixteenth of it
MAX_AXES = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 24  # bytes of a metadata entry, and of a row of the table of tensors


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is.

    Attributes:
      shape: slowest axis first, as in NumPy.
      type: number of its ggml type.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """What a file says before its weights.

    Attributes:
      path: of the file.
      size: of the file, bytes.
      metadata: values by key: bool, int, float, str, or a list of one of them.
      tensors: by name, as the file spells it.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get[T](self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of the metadata; a float may be written as an integer.

        Raises:
          ValueError: it is of another type, or absent where there is no default.
        """
        value: Any = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", list: "a list"}
            got = "none" if value is None else shown(value)
            raise ValueError(f"{self.path}: {key} must be {words[kind]}; got {got}. {DAMAGED}")
        return value


DAMAGED = "The file is damaged or not a language model; download it again."


def is_gguf(place: str | os.PathLike[str]) -> bool:
    """Whether a place is named as a GGUF file, and is no folder."""
    path = Path(place)
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of a GGUF file, versions 2 and 3, little-endian.

    Raises:
      OSError: the file can't be read.
      ValueError: it is no GGUF file, is damaged, or is one part of several.
    """
    stat = os.stat(path)
    return _read_header(Path(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # configuration, tokenizer and weights of one file follow each other
def _read_header(path: Path, modified: int, size: int) -> GGUFHeader:
    with open(path, "rb") as file:
        start = file.read(24)
        _check_start(path, start)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data, 8)
            try:
                header = _parse(reader, path, size)
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise reader.damaged(str(error)) from error
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise ValueError(
            f"{path} must be a whole model; it is one of {shown(parts)} files. Merge them first: llama-gguf-split --merge FIRST OUTPUT."
        )
    return header


def _check_start(path: Path, start: bytes) -> None:
    """Raises ValueError unless the file starts as a GGUF file of a version that is read."""
    if start[:4] != MAGIC or len(start) < 24:
        raise ValueError(
            f"{path} must be a GGUF file, which starts with {MAGIC!r} and is longer than 24 bytes; got {start[:4]!r}. Download it again (it "
            "may be cut off, or a git-lfs pointer)."
        )
    version, swapped = (int.from_bytes(start[4:8], order) for order in ("little", "big"))
    if version not in VERSIONS:
        kind = f"a big-endian file of version {swapped}" if swapped in VERSIONS else f"version {version}"
        raise ValueError(
            f"{path} must be a little-endian GGUF file of version {' or '.join(map(str, VERSIONS))}; got {kind}. Convert the model again "
            "with a current llama.cpp."
        )


class _Reader:
    """A position in the bytes of a file."""

    def __init__(self, path: Path, data: mmap.mmap, position: int):
        self._path, self._data, self.position = path, data, position

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self._path} must be a whole GGUF file; {what}, at byte {self.position}. Download it again (it is cut off or damaged)."
        )

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def count(self, what: str, smallest: int, most: int = MAX_ITEMS) -> int:
        """A number of things that follow, each of at least `smallest` bytes."""
        (count,) = self.numbers("Q")
        if count > min(most, (len(self._data) - self.position) // smallest):
            raise self.damaged(f"it claims {count} {what}")
        return count

    def text(self) -> str:
        length = self.count("bytes of text", 1, len(self._data))
        self.position += length
        return self._data[self.position - length : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            (item,) = self.numbers("I")
            if item == _STRING:
                return [self.text() for _ in range(self.count("texts", 8))]
            values = self.numbers(self._code(item), self.count("numbers", 1))
            return [_short(v) for v in values] if item == _FLOAT32 else list(values)
        (value,) = self.numbers(self._code(kind))
        return _short(value) if kind == _FLOAT32 else value

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.damaged(f"a value is of the unknown type {kind}")
        return _SCALARS[kind]


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _parse(reader: _Reader, path: Path, size: int) -> GGUFHeader:
    tensor_count = reader.count("tensors", _SMALLEST_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(reader.count("metadata entries", _SMALLEST_ENTRY)):
        key = reader.text()
        if key in metadata:
            raise reader.damaged(f"{shown(key)} is there twice")
        (kind,) = reader.numbers("I")
        metadata[key] = reader.value(kind)
    table: dict[str, GGUFTensor] = {}
    for _ in range(tensor_count):
        name = reader.text()
        if name in table:
            raise reader.damaged(f"tensor {shown(name)} is there twice")
        (axes,) = reader.numbers("I")
        if not 1 <= axes <= MAX_AXES:
            raise reader.damaged(f"tensor {shown(name)} has {axes} axes")
        shape = reader.numbers("Q", axes)[::-1]
        (kind,) = reader.numbers("I")
        (offset,) = reader.numbers("Q")
        table[name] = GGUFTensor(shape, kind, offset)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise reader.damaged(f"general.alignment is {shown(alignment)}")
    start = -(-reader.position // alignment) * alignment
    tensors = {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in table.items()}
    return GGUFHeader(path, size, metadata, tensors)

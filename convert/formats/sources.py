"""Sources of tensors: safetensors files on disk, read a few rows at a time, or arrays in memory."""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from seer_jax.text_files import parse_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known before it is read.

    Attributes:
      shape: of the tensor.
      dtype: name as the file has it.
    """

    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class TensorSource(Protocol):
    """A set of named tensors that can be read by rows.

    Attributes:
      place: where they are, for error messages.
      tensors: what is known of each, by name.
    """

    place: str
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor of at least one axis."""
        ...


class ArraySource:
    """Tensors in memory."""

    def __init__(self, place: str, arrays: Mapping[str, np.ndarray]):
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.place = place
        self.tensors: Mapping[str, TensorInfo] = {
            k: TensorInfo(v.shape, names.get(v.dtype, str(v.dtype))) for k, v in arrays.items()
        }
        self._arrays = arrays

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._arrays[name][start:stop]


@dataclasses.dataclass(frozen=True)
class _Location:
    file: io.FileIO
    offset: int


class SafetensorsSource:
    """The tensors of some safetensors files.

    Rows are read with plain reads. Memory-mapped files, as in the safetensors package, count as memory of the process while they are
    open, and whole tensors would be copied once more. Use it as a context manager, or `close` it.

    Attributes:
      metadata: entries of the files' `__metadata__`.

    Raises:
      ValueError: a header is damaged, or two files hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[Path]):
        self.place = str(files[0].parent if len(files) > 1 else files[0])
        tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self._locations: dict[str, _Location] = {}
        with contextlib.ExitStack() as opened:
            for path in files:
                self._add(tensors, path, opened.enter_context(io.FileIO(path)))
            self.tensors: Mapping[str, TensorInfo] = tensors
            self._opened = opened.pop_all()  # an error before this line closes all files

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    def _add(self, tensors: dict[str, TensorInfo], path: Path, file: io.FileIO) -> None:
        header, start, size = _header(path, file)
        for name, entry in header.items():
            if name == "__metadata__":
                self.metadata |= entry if isinstance(entry, dict) else {}
                continue
            if name in tensors:
                raise ValueError(f"Each tensor must be stored once; {name!r} is in {path} and in another file as well.")
            info, begin = _entry(path, name, entry, size - start)
            tensors[name] = info
            self._locations[name] = _Location(file, start + begin)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        info, location = self.tensors[name], self._locations[name]
        dtype, row = DTYPES[info.dtype], info.shape[1:]
        stride = math.prod(row) * dtype.itemsize
        wanted = (stop - start) * stride
        out = np.empty(wanted, np.uint8)
        location.file.seek(location.offset + start * stride)
        done = 0
        while done < wanted:  # a raw read may return fewer bytes than asked for, and on Linux at most 2 GiB
            count = location.file.readinto(memoryview(out)[done:])
            if not count:
                raise ValueError(
                    f"{location.file.name}: the file must hold all of {name!r}; it ends before. Download it again."
                )
            done += count
        return out.view(dtype).reshape(stop - start, *row)


def _header(path: Path, file: io.FileIO) -> tuple[dict, int, int]:
    """(header, start of the data, size of the file)."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} must be a safetensors file, whose first 8 bytes give the length of its header; got length {length} in a "
            f"file of {size} bytes. Download it again (it may be cut off, or a git-lfs pointer)."
        )
    try:
        header = parse_json(file.read(length), f"{path}: the safetensors header")
    except ValueError as error:
        raise ValueError(f"{error} The file is damaged; download it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header must be a JSON object; got a {type(header).__name__}.")
    return header, 8 + length, size


def _entry(path: Path, name: str, entry: object, data_size: int) -> tuple[TensorInfo, int]:
    """One tensor of a header and the offset of its data, checked to lie within the file."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        ):
            pass
        case _:
            raise ValueError(
                f"{path}: a tensor must have dtype, shape and data_offsets; {name!r} has {str(entry)[:200]}."
            )
    known = DTYPES.get(dtype)
    if not begin <= end <= data_size or (known is not None and end - begin != math.prod(shape) * known.itemsize):
        raise ValueError(
            f"{path}: {name!r} of dtype {dtype} and shape {shape} must fill its data_offsets within the {data_size} bytes of data; "
            f"got {begin} to {end}. The file is cut off or damaged; download it again."
        )
    return TensorInfo(tuple(shape), dtype), begin

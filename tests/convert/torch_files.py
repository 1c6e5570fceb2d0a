"""Torch archives made by hand: pickles by the opcode, archives by the member."""

import struct
import zipfile
from pathlib import Path

import numpy as np

VALUES = np.arange(24, dtype=np.float32)


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A zip archive in the layout of torch, with further members."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/data.pkl", data)
        for name, content in members.items():
            out.writestr(f"model/{name}", content)
        for key, content in (storages or {}).items():
            out.writestr(f"model/data/{key}", content)
    return path


def raw_zip(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def storage(key: bytes = text("0"), kind: bytes = b"ctorch\nFloatStorage\n", size: bytes = number(24)) -> bytes:
    return tup(text("storage"), kind, key, text("cpu"), size) + b"Q"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(
    source: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (24,), strides: tuple[int, ...] = (1,)
) -> bytes:
    axes = (tup(*map(number, shape)), tup(*map(number, strides)))
    return REBUILD + tup(source or storage(), number(offset), *axes, b"\x89", HOOKS) + b"R"


def state(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


def item(value: bytes, name: str = "w") -> bytes:
    return text(name) + value


GOOD = state(item(tensor()))

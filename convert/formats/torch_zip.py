"""Torch checkpoints (`.pth`) without torch, read and written; no code from a file is ever run.

A checkpoint is a zip archive: `data.pkl` describes the tensors, `data/0`, `data/1` ... hold their elements as they lie in memory.
"""

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from seer_jax.convert.formats.torch_pickle import STORAGES, Storage, StoredTensor, read_pickle, write_pickle
from seer_jax.outputs import naming_file

MAX_BYTES = 16 * 2**30
MAX_PICKLE_BYTES = 8 * 2**20
MAX_MEMBERS = 100_000
MAX_COMPRESSION = (
    20  # torch never compresses; weights that were zipped again shrink by a tenth, a zip bomb by a thousand
)

_MEMBER = re.compile(r"[^/\\\0]+(/[^/\\\0]+)+")
_ALIGNMENT = 64


def read_torch_zip(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Reads the file that `torch.save` writes from a flat dict of tensors (a state dict).

    Args:
      path: of the file.
      max_bytes: bound on the size of its contents in memory.

    Returns:
      Read-only arrays by name, in the order of the file. Parameters become arrays; tensors that share a storage share memory.

    Raises:
      ValueError: the file is not such an archive: another format, cut off, damaged, big-endian, larger than allowed, or with
        contents other than tensors (which the error names; they are never run).
    """
    path = Path(path)
    _check_format(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size, max_bytes)
            _check_byte_order(archive, members)
            tensors = read_pickle(_read(archive, members, "data.pkl"))
            return _arrays(archive, members, tensors)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: the archive is cut off or damaged ({error}). Download or save it again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_torch_zip(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a file that `torch.load(path, weights_only=True)` reads as a dict of contiguous CPU tensors.

    The same arrays give the same bytes. The file is written under another name and then renamed, so that it is never incomplete.

    Raises:
      ValueError: an array is empty, or of a dtype that torch has no storage for.
      OSError: it can't be written, such as on a full disk; nothing is left of it.
    """
    path = Path(path)
    stored = {}
    for number, (name, array) in enumerate(tensors.items()):
        if array.dtype not in STORAGES.values() or array.size == 0:
            raise ValueError(
                f"An array must be non-empty and of one of the dtypes {', '.join(map(str, STORAGES.values()))}; "
                f"got {name!r} of dtype {array.dtype} and shape {array.shape}."
            )
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        stored[name] = StoredTensor(Storage(str(number), array.dtype, array.size), 0, array.shape, strides)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming_file(path), zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            members = {"data.pkl": write_pickle(stored), ".format_version": b"1", ".storage_alignment": b"64"}
            members["byteorder"] = b"little"
            for name, data in members.items():
                _write(archive, f"archive/{name}", data)
            for number, array in enumerate(tensors.values()):
                _write(archive, f"archive/data/{number}", np.ascontiguousarray(array).tobytes())
            _write(archive, "archive/version", b"3\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_format(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return
    kinds = {
        b"": "an empty file",
        b"version https://git-lfs": "a git-lfs pointer: the weights themselves were not downloaded",
        b"\x80": "torch's legacy format or a plain pickle; load it with torch >= 1.6 and torch.save it again",
    }
    kind = next(
        (text for head, text in kinds.items() if start.startswith(head) and (head or not start)), "another format"
    )
    raise ValueError(f"{path}: a .pth file must be the zip archive that torch.save writes; got {kind}.")


def _members(archive: zipfile.ZipFile, file_size: int, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members by their names below their common folder; all sizes are checked before any member is read."""
    infos = archive.infolist()
    if not 0 < len(infos) <= MAX_MEMBERS:
        raise ValueError(f"The archive must have 1 to {MAX_MEMBERS} members; got {len(infos)}.")
    members: dict[str, zipfile.ZipInfo] = {}
    root = infos[0].filename.split("/")[0]
    for info in infos:
        name = info.filename
        parts = name.split("/")
        if not _MEMBER.fullmatch(name) or ".." in parts or "." in parts or parts[0] != root:
            raise ValueError(f"Members must be plain paths in one common folder; got {name[:120]!r}.")
        if name[len(root) + 1 :] in members:
            raise ValueError(f"Each member must occur once; {name[:120]!r} occurs twice.")
        _check_member(info, file_size)
        members[name[len(root) + 1 :]] = info
    stored, unpacked = sum(i.compress_size for i in infos), sum(i.file_size for i in infos)
    if stored > file_size:
        raise ValueError(f"Members must not overlap: they claim {stored} bytes of a file of {file_size}.")
    if unpacked > max_bytes:
        raise ValueError(f"The contents must not exceed {max_bytes} bytes; the archive declares {unpacked}.")
    if "data.pkl" not in members:
        raise ValueError("The archive has no data.pkl, so it is not a torch checkpoint.")
    if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise ValueError(
            f"data.pkl, which only describes tensors, must not exceed {MAX_PICKLE_BYTES} bytes; "
            f"the archive declares {members['data.pkl'].file_size}."
        )
    return members


def _check_member(info: zipfile.ZipInfo, file_size: int) -> None:
    if not 0 <= info.header_offset < file_size:
        raise ValueError(
            f"Members must begin within the file of {file_size} bytes; {info.filename!r} claims {info.header_offset}."
        )
    if info.flag_bits & 1:
        raise ValueError(f"Members must not be encrypted; {info.filename!r} is.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"Members must be stored or deflated; {info.filename!r} has compression {info.compress_type}.")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise ValueError(
            f"A stored member must declare one size; {info.filename!r} declares {info.file_size} and {info.compress_size}."
        )
    if info.file_size > MAX_COMPRESSION * max(info.compress_size, 64):
        raise ValueError(
            f"A member must unpack to at most {MAX_COMPRESSION} times its packed size; {info.filename!r} declares "
            f"{info.file_size} bytes from {info.compress_size}."
        )


def _check_byte_order(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    # Checkpoints from before torch 2.1 have no such member; practically all of them are little-endian.
    order = _read(archive, members, "byteorder", limit=16) if "byteorder" in members else b"little"
    if order != b"little":
        raise ValueError(
            f"The elements must be little-endian; the archive says {order!r}. Save it on a little-endian machine."
        )


def _read(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, limit: int | None = None
) -> bytes:
    info = members[name]
    if limit is not None and info.file_size > limit:
        raise ValueError(f"The member {name!r} must not exceed {limit} bytes; it declares {info.file_size}.")
    with archive.open(info) as file:
        data = file.read(info.file_size)
        if len(data) != info.file_size:
            raise ValueError(f"The member {name!r} must hold the {info.file_size} bytes it declares; it does not.")
    return data


def _arrays(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], tensors: Mapping[str, StoredTensor]
) -> dict[str, np.ndarray]:
    storages: dict[str, tuple[Storage, np.ndarray]] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in storages:
            storages[storage.key] = storage, _elements(archive, members, storage)
        known, elements = storages[storage.key]
        if known != storage:
            raise ValueError(
                f"A storage must have one dtype and size; storage {storage.key} is used as {known} and {storage}."
            )
        strides = [s * storage.dtype.itemsize for s in tensor.strides]
        view = np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, strides, writeable=False)
        arrays[name] = view
    return arrays


def _elements(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], storage: Storage) -> np.ndarray:
    member = f"data/{storage.key}"
    if member not in members:
        raise ValueError(f"The archive has no member {member!r}, which the pickle refers to.")
    expected = storage.size * storage.dtype.itemsize
    if members[member].file_size != expected:
        raise ValueError(
            f"Storage {storage.key} must be {storage.size} elements of {storage.dtype}, {expected} bytes; "
            f"the archive holds {members[member].file_size}."
        )
    return np.frombuffer(_read(archive, members, member), storage.dtype)


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Adds a member whose bytes start at a multiple of 64, so that torch can memory-map the file."""
    info = zipfile.ZipInfo(name)  # dated 1980-01-01, so that equal tensors give equal files
    assert archive.fp is not None
    header = archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -header % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)

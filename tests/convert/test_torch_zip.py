"""Torch archives: read and written bit for bit; everything that is not a flat dict of tensors is refused and never run."""

import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from seer_jax.convert.formats import torch_zip
from seer_jax.convert.formats.torch_pickle import STORAGES, read_pickle
from seer_jax.convert.formats.torch_zip import read_torch_zip, write_torch_zip
from tests.convert.torch_files import GOOD, VALUES, archive, assert_equal, raw_zip
from tests.golden.data import RELEASE, gate_file, release

# ---------------------------------------------------------------------------------------------- files that torch wrote


@pytest.mark.parametrize("name", RELEASE)
def test_files_written_by_torch(name: str):
    got = read_torch_zip(gate_file(name))
    assert_equal({k: got[k] for k in release(name).gate}, release(name).gate)
    assert len(got) == len(release(name).gate)


@pytest.mark.parametrize("name", RELEASE)
def test_ours_have_the_members_and_the_pickle_of_torch(name: str, tmp_path: Path):
    tensors = read_torch_zip(gate_file(name))
    write_torch_zip(tmp_path / "ours.pth", tensors)
    with zipfile.ZipFile(gate_file(name)) as theirs, zipfile.ZipFile(tmp_path / "ours.pth") as ours:
        members = [{n.split("/", 1)[1] for n in z.namelist()} for z in (theirs, ours)]
        assert members[0] == members[1] | {".data/serialization_id"}
        root = theirs.namelist()[0].split("/")[0]
        for member in members[1] - {"data.pkl"}:
            assert theirs.read(f"{root}/{member}") == ours.read(f"archive/{member}"), member
        pickles = theirs.read(f"{root}/data.pkl"), ours.read("archive/data.pkl")
    assert read_pickle(pickles[0]) == read_pickle(pickles[1])
    assert_equal(read_torch_zip(tmp_path / "ours.pth"), tensors)


# ------------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("dtype", STORAGES.values(), ids=str)
def test_every_dtype_comes_back(dtype: np.dtype, tmp_path: Path):
    raw = np.random.default_rng(0).integers(0, 2, 48 * dtype.itemsize, np.uint8)
    if dtype != np.bool_:
        raw = np.random.default_rng(0).integers(0, 256, 48 * dtype.itemsize, np.uint8)  # NaNs of all kinds among them
    tensors = {"a": raw.view(dtype).reshape(2, 3, 8)}
    write_torch_zip(tmp_path / "a.pth", tensors)
    assert_equal(read_torch_zip(tmp_path / "a.pth"), tensors)


SHAPES = {
    "scalar": np.array(7, np.float32),
    "vector": VALUES,
    "many axes": VALUES.reshape(1, 2, 1, 3, 1, 4, 1),
    "transposed": VALUES.reshape(4, 6).T,
    "every second": VALUES[::2],
    "backwards": VALUES[::-1],
    "broadcast": np.broadcast_to(VALUES, (3, 24)),
    "more than 65535": np.ones((70000, 1), np.int8),
}


def test_every_shape_and_name_comes_back_in_order(tmp_path: Path):
    tensors = SHAPES | {"layers.0.weight/ä€🙂": VALUES, "": VALUES}
    write_torch_zip(tmp_path / "a.pth", tensors)
    got = read_torch_zip(tmp_path / "a.pth")
    assert_equal(got, tensors)
    with pytest.raises(ValueError, match="read-only"):
        got["vector"][0] = 1


def test_an_empty_state_dict_comes_back(tmp_path: Path):
    write_torch_zip(tmp_path / "a.pth", {})
    assert read_torch_zip(tmp_path / "a.pth") == {}


def test_equal_tensors_give_equal_files_whose_data_are_aligned(tmp_path: Path):
    for name in ("a.pth", "b:c d.ckpt"):
        write_torch_zip(tmp_path / name, SHAPES)
    raw = (tmp_path / "a.pth").read_bytes()
    assert raw == (tmp_path / "b:c d.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", raw, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "array", [np.ones(3, np.complex64), np.ones(3, ">f4"), np.ones((2, 0)), np.array(["a"]), np.ones(2, np.uint16)]
)
def test_arrays_that_torch_has_no_storage_for_are_refused(array: np.ndarray, tmp_path: Path):
    with pytest.raises(ValueError, match=r"non-empty and of one of the dtypes float32, bfloat16, .* got 'x' of dtype"):
        write_torch_zip(tmp_path / "a.pth", {"x": array})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- archives by the member


def good_members(root: str = "m") -> list[tuple[str, bytes]]:
    return [(f"{root}/data.pkl", GOOD), (f"{root}/data/0", VALUES.tobytes())]


def patched(path: Path, old: bytes, new: bytes, count: int = -1) -> Path:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, count))
    return path


def encrypted(path: Path) -> Path:
    raw_zip(path, *good_members())
    raw = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = raw.find(signature)
        while start >= 0:
            raw[start + place] |= 1
            start = raw.find(signature, start + 4)
    path.write_bytes(raw)
    return path


def bomb(path: Path) -> Path:
    zeros = bytes(10 * 2**20)
    return raw_zip(path, ("m/data.pkl", GOOD), ("m/data/0", zeros), compression=zipfile.ZIP_DEFLATED)


def overlapping(path: Path) -> Path:
    """Ten names for the same bytes: the central directory points to one member over and over."""
    raw_zip(path, ("m/data.pkl", GOOD), ("m/data/0", np.random.default_rng(0).bytes(5000)))
    with zipfile.ZipFile(path) as opened:
        start = opened.start_dir
    raw = path.read_bytes()
    first, second = (b"PK\x01\x02" + entry for entry in raw[start : raw.index(b"PK\x05\x06")].split(b"PK\x01\x02")[1:])
    entries = first + b"".join(second.replace(b"m/data/0", f"m/data/{i}".encode()) for i in range(10))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 11, 11, len(entries), start, 0)
    path.write_bytes(raw[:start] + entries + end)
    return path


def twice(path: Path) -> Path:
    raw_zip(path, *good_members(), ("m/data/1", VALUES.tobytes()))
    return patched(path, b"m/data/1", b"m/data/0")


def declared(path: Path, offset: int, size: int) -> Path:
    """Changes the size that the central directory declares for data/0."""
    raw_zip(path, *good_members())
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"m/data/0") - 46
    raw[place + offset : place + offset + 4] = struct.pack("<I", size)
    path.write_bytes(raw)
    return path


PLAIN = r"Members must be plain paths in one common folder; got {}"
DAMAGED = r"the archive is cut off or damaged \(.*\)\. Download or save it again"
WRONG_ARCHIVES = {
    "parent folder": (lambda p: raw_zip(p, *good_members(), ("m/../../x", b"")), PLAIN.format(r"'m/\.\./\.\./x'")),
    "current folder": (lambda p: raw_zip(p, *good_members(), ("m/./x", b"")), PLAIN.format(r"'m/\./x'")),
    "absolute": (lambda p: raw_zip(p, *good_members(), ("/etc/passwd", b"")), PLAIN.format("'/etc/passwd'")),
    "two roots": (lambda p: raw_zip(p, *good_members(), ("n/data/1", b"")), PLAIN.format("'n/data/1'")),
    "no root": (lambda p: raw_zip(p, ("data.pkl", GOOD)), PLAIN.format("'data.pkl'")),
    "empty step": (lambda p: raw_zip(p, *good_members(), ("m//x", b"")), PLAIN.format("'m//x'")),
    "folder entry": (lambda p: raw_zip(p, *good_members(), ("m/data/", b"")), PLAIN.format("'m/data/'")),
    "backslash": (lambda p: raw_zip(p, *good_members(), ("m/a\\b", b"")), PLAIN.format("'m/a.*b'")),
    "member twice": (twice, "Each member must occur once; 'm/data/0' occurs twice"),
    "no pickle": (lambda p: raw_zip(p, ("m/data/0", b"x")), "has no data.pkl, so it is not a torch checkpoint"),
    "no storage": (lambda p: raw_zip(p, ("m/data.pkl", GOOD)), "no member 'data/0', which the pickle refers to"),
    "big-endian": (
        lambda p: raw_zip(p, *good_members(), ("m/byteorder", b"big")),
        "must be little-endian; the archive says b'big'",
    ),
    "odd byte order": (
        lambda p: raw_zip(p, *good_members(), ("m/byteorder", b"pdp")),
        "must be little-endian; .* b'pdp'",
    ),
    "long byte order": (
        lambda p: raw_zip(p, *good_members(), ("m/byteorder", b"x" * 17)),
        "'byteorder' must not exceed 16 bytes",
    ),
    "encrypted": (encrypted, "must not be encrypted; 'm/data.pkl' is"),
    "bzip2": (
        lambda p: raw_zip(p, *good_members(), compression=zipfile.ZIP_BZIP2),
        "stored or deflated; .* compression 12",
    ),
    "lzma": (
        lambda p: raw_zip(p, *good_members(), compression=zipfile.ZIP_LZMA),
        "stored or deflated; .* compression 14",
    ),
    "bomb": (bomb, "at most 20 times its packed size; 'm/data/0' declares 10485760 bytes from"),
    "overlapping": (overlapping, "Members must not overlap: they claim [0-9]+ bytes of a file of [0-9]+"),
    "declares more": (lambda p: declared(p, 24, 4000), "must declare one size; 'm/data/0' declares 4000 and 96"),
    "declares less": (lambda p: declared(p, 24, 9), "must declare one size; 'm/data/0' declares 9 and 96"),
    "begins outside": (
        lambda p: declared(p, 42, 10**6),
        "must begin within the file of [0-9]+ bytes; 'm/data/0' claims 1000000",
    ),
    "another checksum": (lambda p: declared(p, 16, 12345), DAMAGED),
    "another number": (
        lambda p: patched(raw_zip(p, *good_members()), VALUES.tobytes(), VALUES[::-1].tobytes()),
        DAMAGED,
    ),
    "another name in the local header": (
        lambda p: patched(raw_zip(p, *good_members()), b"m/data/0", b"m/data/9", 1),
        DAMAGED,
    ),
    "empty file": (lambda p: p.write_bytes(b""), "must be the zip archive that torch.save writes; got an empty file"),
    "empty archive": (lambda p: raw_zip(p), "got another format"),
    "text": (lambda p: p.write_text("hello " * 100), "got another format"),
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "got a git-lfs pointer",
    ),
    "legacy": (
        lambda p: p.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)),
        r"got torch's legacy format or a plain pickle; load it with torch >= 1\.6 and torch\.save it again",
    ),
}


@pytest.mark.parametrize("name", WRONG_ARCHIVES)
def test_wrong_archives_are_refused(name: str, tmp_path: Path):
    make, message = WRONG_ARCHIVES[name]
    path = tmp_path / "a.pth"
    make(path)
    with pytest.raises(ValueError, match=f"a.pth: .*{message}"):
        read_torch_zip(path)


def test_a_compressed_archive_is_read(tmp_path: Path):
    path = raw_zip(tmp_path / "a.pth", *good_members(), compression=zipfile.ZIP_DEFLATED)
    assert_equal(read_torch_zip(path), {"w": VALUES})


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = archive(tmp_path / "a.pth", GOOD, {"0": VALUES.tobytes()})
    size = len(GOOD) + VALUES.nbytes
    assert_equal(read_torch_zip(path, max_bytes=size), {"w": VALUES})
    with pytest.raises(ValueError, match=f"must not exceed {size - 1} bytes; the archive declares {size}"):
        read_torch_zip(path, max_bytes=size - 1)
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", len(GOOD) - 1)
    with pytest.raises(
        ValueError, match=f"data.pkl, .* must not exceed {len(GOOD) - 1} bytes; the archive declares {len(GOOD)}"
    ):
        read_torch_zip(path)
    monkeypatch.setattr(torch_zip, "MAX_MEMBERS", 1)
    with pytest.raises(ValueError, match="must have 1 to 1 members; got 2"):
        read_torch_zip(path)


@pytest.mark.parametrize("keep", [4, 30, 100, 0.3, 0.9, -22, -1])
def test_truncated_files_are_refused(keep: float, tmp_path: Path):
    raw = gate_file("prefill_llama_a").read_bytes()
    length = int(keep * len(raw)) if isinstance(keep, float) else keep
    (tmp_path / "a.pth").write_bytes(raw[:length])
    with pytest.raises(ValueError, match=DAMAGED):
        read_torch_zip(tmp_path / "a.pth")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_torch_zip(tmp_path / "a.pth")


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path):
    """One byte changed at random, 600 times: an error that names the file, or the very same numbers."""
    path = archive(tmp_path / "a.pth", GOOD, {"0": VALUES.tobytes()}, byteorder=b"little")
    whole, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(600):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw)
        try:
            assert_equal(read_torch_zip(path), {"w": VALUES})
        except ValueError as error:
            assert "a.pth" in str(error)
            refused += 1
    assert refused > 300

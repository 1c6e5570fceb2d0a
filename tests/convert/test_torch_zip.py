"""Torch archives: read and written bit for bit; everything that is not a flat dict of tensors is refused and never run."""

import builtins
import collections
import contextlib
import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.convert import torch_zip
from seer_jax.convert.torch_pickle import STORAGES, read_pickle
from seer_jax.convert.torch_zip import read_torch_zip, write_torch_zip
from tests.golden.data import RELEASE, gate_file, release

BFLOAT16 = np.dtype(jnp.bfloat16)
VALUES = np.arange(24, dtype=np.float32)


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


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


# ----------------------------------------------------------------- other pickles that torch writes, by the pickle module


class FakeStorage:
    """What the pickler takes for a torch storage."""

    def __init__(self, values: np.ndarray, kind: str, key: str):
        self.values, self.kind, self.key = values, kind, key


class FakeTensor:
    def __init__(self, storage: FakeStorage, offset: int, shape: tuple, strides: tuple):
        self.args = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.args


class FakeParameter:
    def __init__(self, tensor: FakeTensor):
        self.tensor = tensor

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_parameter, (self.tensor, True, collections.OrderedDict())


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the names of torch, so that the pickle module can refer to them."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "torch.nn")}
    for name in STORAGES:
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *args: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(modules["torch._utils"], name, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def pickled(obj: Any, protocol: int) -> tuple[bytes, dict[str, bytes]]:
    """data.pkl and the storages, in the way of torch.save."""
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, FakeStorage):
                storages[obj.key] = obj.values.tobytes()
                return ("storage", getattr(sys.modules["torch"], obj.kind), obj.key, "cuda:0", obj.values.size)
            return None

    out = io.BytesIO()
    Pickler(out, protocol).dump(obj)
    return out.getvalue(), storages


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A zip archive in the layout of torch; `members` with `_` for `.` come on top."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/data.pkl", data)
        for name, content in members.items():
            out.writestr(f"model/{name}", content)
        for key, content in (storages or {}).items():
            out.writestr(f"model/data/{key}", content)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_pickles_of_every_binary_protocol(protocol: int, kind: type, torch_names: None, tmp_path: Path):
    shared = FakeStorage(VALUES, "FloatStorage", "0")
    half = FakeStorage(VALUES.astype(np.float16), "HalfStorage", "1")
    state = kind(
        [
            ("whole", FakeTensor(shared, 0, (4, 6), (6, 1))),
            ("transposed", FakeTensor(shared, 0, (6, 4), (1, 6))),
            ("rows", FakeTensor(shared, 6, (2, 6), (6, 1))),
            ("column", FakeTensor(shared, 5, (4,), (6,))),
            ("scalar", FakeTensor(shared, 23, (), ())),
            ("one row", FakeTensor(shared, 3, (1, 2), (2**40, 1))),
            ("parameter", FakeParameter(FakeTensor(half, 0, (24,), (1,)))),
        ]
    )
    if kind is collections.OrderedDict:
        state._metadata = collections.OrderedDict([("", dict(version=1)), ("layer", dict(version=None))])
    table = VALUES.reshape(4, 6)
    got = read_torch_zip(archive(tmp_path / "a.pth", *pickled(state, protocol), byteorder=b"little"))
    expected = {"whole": table, "transposed": table.T, "rows": table[1:3], "column": table[:, 5]}
    expected |= {"scalar": np.array(23, np.float32), "one row": table[:1, 3:5], "parameter": VALUES.astype(np.float16)}
    assert_equal(got, expected)


# -------------------------------------------------------------------------------------------------- pickles by the opcode

TOUCH = "touch-by-a-pickle"


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


def test_the_pickles_below_are_right_but_for_what_they_show(tmp_path: Path):
    assert_equal(read_torch_zip(archive(tmp_path / "a.pth", GOOD, {"0": VALUES.tobytes()})), {"w": VALUES})


class Runs:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class SetsState(collections.OrderedDict):
    def __reduce__(self) -> tuple:
        return collections.OrderedDict, (), {"__class__": "x"}


def module_pickle() -> bytes:
    return b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}" + text("weight") + tensor() + b"sb."


NAMED = r"The pickle names '{}', which is not on the closed list of names for tensors\. Nothing was run"
POSIX = f"{os.name}.system"
MALICIOUS = {
    "os.system": (lambda: pickle.dumps(Runs(os.system, f"touch {TOUCH}"), 2), NAMED.format("posix.system")),
    "os.system, protocol 4": (lambda: pickle.dumps(Runs(os.system, f"touch {TOUCH}"), 4), NAMED.format("posix.system")),
    "eval": (lambda: pickle.dumps(Runs(eval, f"open('{TOUCH}', 'w')"), 2), NAMED.format("__builtin__.eval")),
    "exec": (lambda: pickle.dumps(Runs(exec, f"open('{TOUCH}', 'w')"), 4), NAMED.format("builtins.exec")),
    "open": (lambda: pickle.dumps(Runs(builtins.open, TOUCH, "w"), 4), NAMED.format("_?io.open")),
    "import": (lambda: pickle.dumps(Runs(__import__, "antigravity"), 4), NAMED.format("builtins.__import__")),
    "getattr chain": (
        lambda: b"\x80\x04" + b"cbuiltins\ngetattr\n" + tup(b"cos\npath\n", text("os")) + b"R.",
        NAMED.format("builtins.getattr"),
    ),
    "among tensors": (
        lambda: state(item(tensor()), item(b"cposix\nsystem\n" + tup(text(f"touch {TOUCH}")) + b"R", "x")),
        NAMED.format("posix.system"),
    ),
    "as hooks": (
        lambda: GOOD.replace(HOOKS, b"cposix\nsystem\n" + tup(text(f"touch {TOUCH}")) + b"R"),
        NAMED.format("posix.system"),
    ),
    "dotted name": (
        lambda: b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93)R.",
        NAMED.format("collections.OrderedDict.fromkeys"),
    ),
    "nn.Module": (module_pickle, NAMED.format("torch.nn.modules.linear.Linear")),
    "torch.load": (lambda: b"\x80\x02ctorch\nload\n" + tup(text("x")) + b"R.", NAMED.format("torch.load")),
    "other rebuild": (lambda: GOOD.replace(b"_v2\n", b"_v3\n"), NAMED.format("torch._utils._rebuild_tensor_v3")),
    "INST": (lambda: b"\x80\x02(" + text(f"touch {TOUCH}") + b"iposix\nsystem\n.", "uses the operation INST"),
    "OBJ": (lambda: b"\x80\x02(ccollections\nOrderedDict\no.", "uses the operation OBJ"),
    "NEWOBJ": (lambda: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the operation NEWOBJ"),
    "extension registry": (lambda: b"\x80\x02\x82\x01)R.", "uses the operation EXT1"),
    "calling a dtype": (
        lambda: b"\x80\x02ctorch\nFloatStorage\n)R.",
        "Only the permitted rebuild functions can be applied",
    ),
    "calling a string": (
        lambda: b"\x80\x02" + text("x") + b")R.",
        "Only the permitted rebuild functions can be applied",
    ),
    "calling without a tuple": (lambda: b"\x80\x02" + REBUILD + b"}R.", "Only the permitted rebuild functions"),
    "attributes of a function": (
        lambda: b"\x80\x02" + REBUILD + b"}" + text("__code__") + b"Nsb.",
        "Object state can only be",
    ),
    "attributes of a dict": (lambda: b"\x80\x02" + HOOKS + b"}" + text("keys") + b"Nsb.", "only be the _metadata"),
    "slots": (lambda: b"\x80\x02" + HOOKS + tup(b"}", b"}") + b"b.", "Object state can only be the _metadata"),
    "OrderedDict of pairs": (lambda: b"\x80\x02ccollections\nOrderedDict\n" + tup(b")") + b"R.", "must be made empty"),
    "text protocol": (lambda: b"cposix\nsystem\n(S'touch x'\ntR.", NAMED.format("posix.system")),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickles_are_refused_and_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make, message = MALICIOUS[name]
    path = archive(tmp_path / "a.pth", make(), {"0": VALUES.tobytes()})
    with pytest.raises(ValueError, match=message):
        read_torch_zip(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


BIG = 2**62
WITHIN = "must lie within its storage of 24 numbers"
PID = r"A persistent id must be \('storage', storage type, key, location, size\); got"
TENSOR = r"A tensor must be \(storage, offset, shape, strides, ...\)"
CONTENT = "Expected a flat mapping of names to tensors; got {}"
WRONG_PICKLES = {
    "offset outside": (state(item(tensor(offset=1))), WITHIN),
    "offset far outside": (state(item(tensor(offset=2**47))), WITHIN),
    "offset negative": (state(item(tensor(offset=-1))), TENSOR),
    "shape outside": (state(item(tensor(shape=(25,)))), WITHIN),
    "stride outside": (state(item(tensor(shape=(4, 6), strides=(7, 1)))), WITHIN),
    "stride negative": (state(item(tensor(offset=23, strides=(-1,)))), TENSOR),
    "overflow": (state(item(tensor(shape=(BIG, BIG, BIG), strides=(BIG, BIG, BIG)))), TENSOR),
    "overflow of the product": (state(item(tensor(shape=(2**40, 2**40), strides=(0, 0)))), "may not repeat numbers"),
    "repeated": (state(item(tensor(shape=(1000, 24), strides=(0, 1)))), "may not repeat numbers of its storage; shape"),
    "empty": (state(item(tensor(shape=(0, 24), strides=(24, 1)))), r"hold at least one number; got shape \(0, 24\)"),
    "axes and strides differ": (state(item(tensor(shape=(4, 6)))), TENSOR),
    "too many axes": (state(item(tensor(shape=(1,) * 33, strides=(1,) * 33))), TENSOR),
    "shape of booleans": (state(item(tensor()).replace(tup(number(24)), tup(b"\x88"))), TENSOR),
    "no storage": (state(item(tensor(source=b"N"))), TENSOR),
    "storage a string": (state(item(tensor(source=text("0")))), TENSOR),
    "three arguments": (state(item(REBUILD + tup(storage(), number(0), b")") + b"R")), TENSOR),
    "parameter of a string": (
        state(item(b"ctorch._utils\n_rebuild_parameter\n" + tup(text("x"), b"\x88", HOOKS) + b"R")),
        "A parameter must be",
    ),
    "id no tuple": (state(item(tensor(source=text("0") + b"Q"))), f"{PID} str that is not"),
    "id with another tag": (state(item(tensor(source=storage().replace(b"storage", b"storagf")))), PID),
    "id without location": (state(item(tensor(source=tup(text("storage"), text("0")) + b"Q"))), PID),
    "id with a type by name": (state(item(tensor(source=storage(kind=text("FloatStorage"))))), PID),
    "id with a function as type": (state(item(tensor(source=storage(kind=REBUILD)))), PID),
    "id with a number as key": (state(item(tensor(source=storage(key=number(0))))), PID),
    "size negative": (state(item(tensor(source=storage(size=number(-24))))), PID),
    "size huge": (state(item(tensor(source=storage(size=number(BIG))))), PID),
    "size a boolean": (state(item(tensor(source=storage(size=b"\x88")))), PID),
    "size wrong": (
        state(item(tensor(source=storage(size=number(25))))),
        "25 numbers of float32, 100 bytes; the archive holds 96",
    ),
    "size wrong for the dtype": (
        state(item(tensor(source=storage(kind=b"ctorch\nHalfStorage\n")))),
        "24 numbers of float16, 48 bytes; the archive holds 96",
    ),
    "key a path": (
        state(item(tensor(source=storage(key=text("../../etc/passwd"))))),
        "key must be a decimal number; got '../",
    ),
    "key empty": (state(item(tensor(source=storage(key=text(""))))), "key must be a decimal number; got ''"),
    "key in other digits": (
        state(item(tensor(source=storage(key=text("\u0660"))))),
        "key must be a decimal number; got",
    ),
    "key unknown": (
        state(item(tensor(source=storage(key=text("7"))))),
        "no member 'data/7', which the pickle refers to",
    ),
    "one storage, two dtypes": (
        state(item(tensor()), item(tensor(storage(kind=b"ctorch\nIntStorage\n")), "x")),
        "A storage must have one dtype and size; storage 0 is used as",
    ),
    "untyped storage": (
        state(item(tensor(source=storage(kind=b"ctorch.storage\nUntypedStorage\n")))),
        NAMED.format(r"torch\.storage\.UntypedStorage"),
    ),
    "complex storage": (
        state(item(tensor(source=storage(kind=b"ctorch\nComplexFloatStorage\n")))),
        NAMED.format(r"torch\.ComplexFloatStorage"),
    ),
    "fp8 storage": (
        state(item(tensor(source=storage(kind=b"ctorch\nFloat8_e4m3fnStorage\n")))),
        NAMED.format(r"torch\.Float8_e4m3fnStorage"),
    ),
    "nested": (
        state(item(b"}(" + item(tensor()) + b"u", "model")),
        CONTENT.format("a mapping under 'model'. Save the state"),
    ),
    "number among tensors": (state(item(tensor()), item(number(3), "step")), CONTENT.format("int under 'step'")),
    "string among tensors": (state(item(text("x"), "note")), CONTENT.format("str under 'note'")),
    "none among tensors": (state(item(b"N", "none")), CONTENT.format("NoneType under 'none'")),
    "bare storage": (state(item(storage())), CONTENT.format("Storage under 'w'")),
    "a dtype": (state(item(b"ctorch\nFloatStorage\n")), CONTENT.format("_StorageType under 'w'")),
    "a float": (b"\x80\x02}" + text("w") + b"G" + bytes(8) + b"s.", "uses the operation BINFLOAT"),
    "a list": (
        b"\x80\x02](" + tensor() + b"e.",
        "uses the operation EMPTY_LIST, which a flat dict of tensors has no use for",
    ),
    "a tensor alone": (b"\x80\x02" + tensor() + b".", CONTENT.format("StoredTensor")),
    "a tuple": (b"\x80\x02" + tensor() + b"\x85.", CONTENT.format("tuple")),
    "name twice": (state(item(tensor()), item(tensor())), "Each name may occur once; 'w' comes twice"),
    "name a number": (state(number(1) + tensor()), "A name must be a string; got int"),
    "name a mapping": (state(b"}" + tensor()), "A name must be a string; got dict"),
    "items on a tuple": (b"\x80\x02)" + text("w") + tensor() + b"s.", "Items can only be set on a mapping, in pairs"),
    "odd items": (b"\x80\x02}(" + text("w") + b"u.", "Items can only be set on a mapping, in pairs"),
    "no end": (GOOD[:-1], "The pickle has no end"),
    "cut in a string": (GOOD[:9], "expected [0-9]+ bytes in a unicodestring4, but only"),
    "nothing": (b"", "The pickle has no end"),
    "cut in a global": (GOOD[:30], "A global name must be two lines"),
    "no pickle": (b"\xfe\xff\x00", "uses the unknown operation b'.xfe'"),
    "string not UTF-8": (b"\x80\x02}X\x01\x00\x00\x00\xff.", "A string in the pickle is not UTF-8"),
    "takes too much": (b"\x80\x02}ss.", "takes more from its stack than it put there"),
    "ends on nothing": (b"\x80\x02.", "takes more from its stack than it put there"),
    "ends on a mark": (b"\x80\x02}(.", "takes more from its stack than it put there"),
    "no mark": (b"\x80\x02}u.", "takes more from its stack than it put there"),
    "tuple of nothing": (b"\x80\x02\x87.", "takes more from its stack than it put there"),
    "memo of nothing": (b"\x80\x02q\x00.", "takes more from its stack than it put there"),
    "unknown memo": (b"\x80\x02h\x07.", "recalls something that it never stored"),
    "two objects": (b"\x80\x02}}.", "leaves more than one object behind"),
    "contains itself": (b"\x80\x02}q\x00" + text("w") + b"h\x00s.", CONTENT.format("a mapping under 'w'")),
    "global of numbers": (b"\x80\x04K\x01K\x02\x93.", "A global name must be two strings"),
}


@pytest.mark.parametrize("name", WRONG_PICKLES)
def test_wrong_pickles_are_refused(name: str, tmp_path: Path):
    data, message = WRONG_PICKLES[name]
    path = archive(tmp_path / "a.pth", data, {"0": VALUES.tobytes()})
    with pytest.raises(ValueError, match=f"a.pth: .*{message}"):
        read_torch_zip(path)


def test_a_tuple_that_doubles_itself_is_refused_at_once(tmp_path: Path):
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 2000 + b"."
    with pytest.raises(ValueError, match=CONTENT.format("tuple")):
        read_torch_zip(archive(tmp_path / "a.pth", doubled))


# --------------------------------------------------------------------------------------------------- archives by the member


def raw_zip(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


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


def overlapping(path: Path, copies: int = 50) -> Path:
    """Many names for the same bytes: the central directory points to one member over and over."""
    content = np.random.default_rng(0).bytes(5000)
    raw_zip(path, ("m/data.pkl", GOOD), ("m/data/0", content))
    with zipfile.ZipFile(path) as z:
        entry = z.getinfo("m/data/0")
        start = z.start_dir
    raw = path.read_bytes()
    head, tail = raw[:start], raw[start:]
    central = tail[tail.index(b"PK\x01\x02", 4) : tail.index(b"PK\x05\x06")]
    first = tail[: tail.index(b"PK\x01\x02", 4)]
    entries = first + b"".join(central.replace(b"m/data/0", f"m/data/{i}".encode()) for i in range(min(copies, 10)))
    end = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, 1 + min(copies, 10), 1 + min(copies, 10), len(entries), len(head), 0
    )
    assert entry.file_size == 5000
    path.write_bytes(head + entries + end)
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
    "member twice": (twice, "Each member may occur once; 'm/data/0' comes twice"),
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
    "empty file": (lambda p: p.write_bytes(b""), "expected the zip archive that torch.save writes; got an empty file"),
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


def test_damaged_pickles_are_refused_or_flat(tmp_path: Path):
    """Bytes of the pickle changed at random: an error, or still names and places of tensors."""
    chance = random.Random(1)
    for _ in range(3000):
        raw = bytearray(GOOD)
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            assert all(type(name) is str for name in read_pickle(bytes(raw)))

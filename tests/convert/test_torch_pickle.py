"""The pickle in a torch archive: what torch writes is read, everything else is refused and never run."""

import builtins
import collections
import contextlib
import io
import os
import pickle
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax.convert.formats.torch_pickle import STORAGES, read_pickle
from seer_jax.convert.formats.torch_zip import read_torch_zip
from tests.convert.torch_files import (
    GOOD,
    HOOKS,
    REBUILD,
    VALUES,
    archive,
    assert_equal,
    item,
    number,
    state,
    storage,
    tensor,
    text,
    tup,
)

TOUCH = "touch-by-a-pickle"


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


# -------------------------------------------------------------------------------------------------------------- refusals


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
WITHIN = "must lie within its storage of 24 elements"
PID = r"A persistent id must be \('storage', storage type, key, location, size\); got"
TENSOR = r"A tensor must be \(storage, offset, shape, strides, ...\)"
CONTENT = "must hold a flat mapping of names to tensors; got {}"
WRONG_PICKLES = {
    "offset outside": (state(item(tensor(offset=1))), WITHIN),
    "offset far outside": (state(item(tensor(offset=2**47))), WITHIN),
    "offset negative": (state(item(tensor(offset=-1))), TENSOR),
    "shape outside": (state(item(tensor(shape=(25,)))), WITHIN),
    "stride outside": (state(item(tensor(shape=(4, 6), strides=(7, 1)))), WITHIN),
    "stride negative": (state(item(tensor(offset=23, strides=(-1,)))), TENSOR),
    "overflow": (state(item(tensor(shape=(BIG, BIG, BIG), strides=(BIG, BIG, BIG)))), TENSOR),
    "overflow of the product": (state(item(tensor(shape=(2**40, 2**40), strides=(0, 0)))), "must not repeat elements"),
    "repeated": (
        state(item(tensor(shape=(1000, 24), strides=(0, 1)))),
        "must not repeat elements of its storage; shape",
    ),
    "empty": (state(item(tensor(shape=(0, 24), strides=(24, 1)))), r"hold at least one element; got shape \(0, 24\)"),
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
        "25 elements of float32, 100 bytes; the archive holds 96",
    ),
    "size wrong for the dtype": (
        state(item(tensor(source=storage(kind=b"ctorch\nHalfStorage\n")))),
        "24 elements of float16, 48 bytes; the archive holds 96",
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
        "uses the operation EMPTY_LIST, which a flat dict of tensors does not need",
    ),
    "a tensor alone": (b"\x80\x02" + tensor() + b".", CONTENT.format("StoredTensor")),
    "a tuple": (b"\x80\x02" + tensor() + b"\x85.", CONTENT.format("tuple")),
    "name twice": (state(item(tensor()), item(tensor())), "Each name must occur once; 'w' occurs twice"),
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
    "takes too much": (b"\x80\x02}ss.", "must not take more from its stack than it put there"),
    "ends on nothing": (b"\x80\x02.", "must not take more from its stack than it put there"),
    "ends on a mark": (b"\x80\x02}(.", "must not take more from its stack than it put there"),
    "no mark": (b"\x80\x02}u.", "must not take more from its stack than it put there"),
    "tuple of nothing": (b"\x80\x02\x87.", "must not take more from its stack than it put there"),
    "memo of nothing": (b"\x80\x02q\x00.", "must not take more from its stack than it put there"),
    "unknown memo": (b"\x80\x02h\x07.", "must store an object before it recalls it"),
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


def test_damaged_pickles_are_refused_or_flat(tmp_path: Path):
    """Bytes of the pickle changed at random: an error, or still names and places of tensors."""
    chance = random.Random(1)
    for _ in range(3000):
        raw = bytearray(GOOD)
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            assert all(type(name) is str for name in read_pickle(bytes(raw)))

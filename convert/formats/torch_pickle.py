"""The pickle inside a torch archive, read as data: a closed list of operations and names; nothing is ever called.

`pickle.Unpickler` calls any function that the file names. This reader has its own stack machine instead. It knows the operations that
`torch.save` writes for a flat mapping of names to tensors, maps the few permitted global names to plain markers, and refuses all others.
"""

import collections
import dataclasses
import enum
import functools
import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
MAX_DIMENSIONS = 32
MAX_COUNT = 2**48  # sizes, offsets and strides stay far from 64-bit overflow, also in bytes


class _Global(enum.Enum):
    """Names that a pickle may call; each stands for a rule of this module, never for a Python object."""

    ORDERED_DICT = "collections OrderedDict"
    TENSOR = "torch._utils _rebuild_tensor_v2"
    PARAMETER = "torch._utils _rebuild_parameter"


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Storage:
    """A contiguous buffer of elements in the archive.

    Attributes:
      key: decimal name of the archive member `data/<key>`.
      dtype: of its elements.
      size: number of elements.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided view into a storage, checked to lie within it; offset and strides count elements, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_GLOBALS: dict[str, Any] = {g.value: g for g in _Global}
_GLOBALS.update({f"torch {name}": _StorageType(dtype) for name, dtype in STORAGES.items()})
_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
_MARK = object()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _look_up(name: str) -> Any:
    _require(
        name in _GLOBALS,
        f"The pickle names {name.replace(' ', '.')[:120]!r}, which is not on the closed list of names for tensors. Nothing was run. "
        "The file must be one that torch.save wrote from a flat dict of tensors.",
    )
    return _GLOBALS[name]


def _storage(pid: Any) -> Storage:
    valid = (
        type(pid) is tuple
        and len(pid) == 5
        and pid[0] == "storage"
        and type(pid[1]) is _StorageType
        and type(pid[2]) is str
        and type(pid[3]) is str
        and _is_count(pid[4])
    )
    _require(
        valid, f"A persistent id must be ('storage', storage type, key, location, size); got {_kind(pid)} that is not."
    )
    _, kind, key, _, size = pid
    _require(
        key.isascii() and key.isdecimal() and len(key) <= 9,
        f"A storage key must be a decimal number; got {key[:80]!r}.",
    )
    return Storage(key, kind.dtype, size)


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    valid = (
        len(args) in (6, 7)
        and type(args[0]) is Storage
        and _is_count(args[1])
        and type(args[2]) is tuple
        and type(args[3]) is tuple
        and len(args[2]) == len(args[3]) <= MAX_DIMENSIONS
        and all(_is_count(n) for n in (*args[2], *args[3]))
    )
    _require(valid, "A tensor must be (storage, offset, shape, strides, ...), with as many strides as axes.")
    storage, offset, shape, strides = args[:4]
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    _require(count > 0, f"A tensor must hold at least one element; got shape {shape}.")
    _require(
        last < storage.size,
        f"A tensor must lie within its storage of {storage.size} elements; shape {shape}, strides {strides} and offset {offset} "
        "reach outside it.",
    )
    _require(
        count <= storage.size,
        f"A tensor must not repeat elements of its storage; shape {shape} has more than the {storage.size} stored.",
    )
    return StoredTensor(storage, offset, shape, strides)


def _call(target: Any, args: Any) -> Any:
    _require(
        type(target) is _Global and type(args) is tuple,
        "Only the permitted rebuild functions can be applied, to a tuple.",
    )
    if target is _Global.ORDERED_DICT:
        _require(args == (), "OrderedDict must be made empty and then filled.")
        return collections.OrderedDict()
    if target is _Global.TENSOR:
        return _tensor(args)
    _require(len(args) == 3 and type(args[0]) is StoredTensor, "A parameter must be (tensor, requires_grad, hooks).")
    return args[0]


def _set_items(target: Any, items: list[Any]) -> None:
    _require(isinstance(target, dict) and len(items) % 2 == 0, "Items can only be set on a mapping, in pairs.")
    for key, value in zip(items[::2], items[1::2], strict=True):
        _require(type(key) is str, f"A name must be a string; got {type(key).__name__}.")
        _require(key not in target, f"Each name must occur once; {key[:120]!r} occurs twice.")
        target[key] = value


def _build(target: Any, state: Any) -> None:
    # nn.Module.state_dict() attaches version numbers to the OrderedDict; they are not needed.
    _require(
        isinstance(target, dict) and isinstance(state, dict) and set(state) <= {"_metadata"},
        "Object state can only be the _metadata of a state dict.",
    )


class _Machine:
    """Runs the permitted operations over a stack."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        _require(
            bool(self.stack) and self.stack[-1] is not _MARK,
            "The pickle must not take more from its stack than it put there.",
        )
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        _require(bool(self.stack), "The pickle must not take more from its stack than it put there.")
        self.stack.pop()
        return items[::-1]

    def pop_count(self, count: int) -> tuple[Any, ...]:
        return tuple(self.pop() for _ in range(count))[::-1]

    def step(self, name: str, read: Callable[[], Any]) -> None:
        """Runs one operation; `read` returns its argument, so that arguments of refused operations are never parsed."""
        match name:
            case "PROTO" | "FRAME":
                read()
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "MARK":
                self.stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(read())
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(self.pop_count(int(name[-1])))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[read()] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                number = read()
                _require(number in self.memo, "The pickle must store an object before it recalls it.")
                self.stack.append(self.memo[number])
            case "GLOBAL":
                self.stack.append(_look_up(read()))
            case "STACK_GLOBAL":
                module, attribute = self.pop_count(2)
                _require(type(module) is type(attribute) is str, "A global name must be two strings.")
                self.stack.append(_look_up(f"{module} {attribute}"))
            case "BINPERSID":
                self.stack.append(_storage(self.pop()))
            case "REDUCE":
                self.stack.append(_call(*self.pop_count(2)))
            case "SETITEM":
                key, value = self.pop_count(2)
                _set_items(self.top(), [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                _set_items(self.top(), items)
            case "BUILD":
                state = self.pop()
                _build(self.top(), state)
            case _:
                raise ValueError(
                    f"The pickle uses the operation {name}, which a flat dict of tensors does not need. The file must be one that "
                    "torch.save wrote from a dict of names to tensors."
                )


def read_pickle(data: bytes) -> dict[str, StoredTensor]:
    """Names of the tensors in `data.pkl`, and where each lies.

    Raises:
      ValueError: the pickle is cut off, or holds more than a flat mapping of names to tensors.
    """
    machine, stream = _Machine(), io.BytesIO(data)
    try:
        for code in iter(lambda: stream.read(1), b"."):
            operation = _OPERATIONS.get(code.decode("latin-1"))
            if operation is None:
                raise ValueError(f"The pickle {f'uses the unknown operation {code!r}' if code else 'has no end'}.")
            machine.step(operation.name, functools.partial(_argument, operation, stream))
    except UnicodeDecodeError as error:
        raise ValueError("A string in the pickle is not UTF-8.") from error
    result = machine.pop()
    _require(not machine.stack, "The pickle leaves more than one object behind.")
    _require(isinstance(result, dict), f"The pickle must hold a flat mapping of names to tensors; got {_kind(result)}.")
    for name, value in result.items():
        _require(
            type(value) is StoredTensor,
            f"The pickle must hold a flat mapping of names to tensors; got {_kind(value)} under {name[:120]!r}. Save the state dict alone.",
        )
    return dict(result)


def _argument(operation: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if operation.name == "GLOBAL":  # pickletools would interpret backslashes in it
        lines = stream.readline(), stream.readline()
        _require(all(line.endswith(b"\n") for line in lines), "A global name must be two lines.")
        return " ".join(line[:-1].decode() for line in lines)
    return None if operation.arg is None else operation.arg.reader(stream)


def _kind(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else type(value).__name__


def write_pickle(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The bytes of `data.pkl` for a dict of tensors, in pickle protocol 2 with the operations that torch uses."""
    names = {dtype: name for name, dtype in STORAGES.items()}
    items = []
    for name, tensor in tensors.items():
        storage = tensor.storage
        kind = f"ctorch\n{names[storage.dtype]}\n".encode()
        pid = _tuple(_text("storage"), kind, _text(storage.key), _text("cpu"), _integer(storage.size)) + b"Q"
        shape, strides = (_tuple(*map(_integer, axes)) for axes in (tensor.shape, tensor.strides))
        hooks = b"ccollections\nOrderedDict\n)R"
        args = _tuple(pid, _integer(tensor.offset), shape, strides, b"\x89", hooks)
        items.append(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"R")
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(raw)]) + raw

"""Checkpoint tensors into the parameters of a module, a few rows at a time.

A parameter of at most `CHUNK_BYTES` is put on its device as it is. A larger one is an array there from the start; pieces of at most so
many bytes are read, checked and written into it in place. The host holds at most two pieces, however large the model is, a sharded
parameter is never whole in one place, and each process reads the rows that its devices hold, once.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.precision import rounded
from seer_jax.convert.formats.sources import TensorInfo, TensorSource
from seer_jax.convert.rules import Rule, Slot, expected_slots

CHUNK_BYTES = 16 * 2**20
FLOAT_DTYPES = ("BF16", "F16", "F32")
SHOWN = 8
_DEVICES = "devices"

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
_Part = tuple[slice, ...]  # of a parameter, with start and stop along each axis


def load_parameters[M: nnx.Module](
    module: M,
    rules: Sequence[Rule],
    source: TensorSource,
    *,
    ignored: Iterable[str] = (),
    sharding: Sharding | None = None,
) -> M:
    """The module with its parameters read from a checkpoint.

    Args:
      module: abstract, as `nnx.eval_shape` gives it; its shapes and dtypes are those of the result.
      rules: which tensor is which parameter.
      source: the checkpoint.
      ignored: regular expressions for the whole names of tensors that may be there and are not read.
      sharding: returns each parameter's sharding from its path ("layers.mlp.up_proj.weight") and its abstract array. None: the
        default device.

    Raises:
      ValueError: tensors are missing or left over, or one has the wrong shape, a dtype that is no float of 16 or 32 bits, or elements
        that are not finite.
    """
    graph, state = nnx.split(module)
    parameters = _by_path(state)
    slots = check_tensors(module, rules, source, ignored=ignored)
    by_path: dict[str, list[str]] = {path: [] for path in parameters}
    for key, slot in slots.items():
        by_path[slot.path].append(key)  # in the order of layers, and of experts within a layer
    arrays = {
        path: _fill(spec, by_path[path], source, None if sharding is None else sharding(path, spec))
        for path, spec in parameters.items()
    }
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays, sep="."))
    return nnx.merge(graph, state)


def check_tensors(
    module: nnx.Module, rules: Sequence[Rule], source: TensorSource, *, ignored: Iterable[str] = ()
) -> dict[str, Slot]:
    """Where each tensor of a checkpoint goes, by its name, from their names, shapes and dtypes alone; arguments as in `load_parameters`.

    Raises:
      ValueError: tensors are missing or left over, or one has the wrong shape or a dtype that is no float of 16 or 32 bits.
    """
    slots = expected_slots(rules, {path: spec.shape for path, spec in _by_path(nnx.state(module)).items()})
    _check(slots, source, ignored)
    return slots


def _by_path(state: Any) -> dict[str, Any]:
    flat: Any = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")
    return flat


def tensors_of(module: nnx.Module, kind: type[nnx.Param], rules: Sequence[Rule]) -> Iterator[tuple[str, jax.Array]]:
    """The module's parameters of a kind as checkpoint tensors, one at a time, in the order of `expected_slots`."""
    arrays = _by_path(nnx.state(module, kind))
    for key, slot in expected_slots(rules, {path: array.shape for path, array in arrays.items()}).items():
        array = arrays[slot.path]
        yield key, array[slot.indices] if slot.indices else array


def _check(slots: Mapping[str, Slot], source: TensorSource, ignored: Iterable[str]) -> None:
    """Raises ValueError unless the tensors are those that are expected, of the right shape and dtype, and no others."""
    found = source.tensors
    redundant = re.compile("|".join(ignored) or "(?!)")
    missing = [key for key in slots if key not in found]
    left_over = [key for key in found if key not in slots and not redundant.fullmatch(key)]
    if missing or left_over:
        raise ValueError(
            f"{source.place}: a checkpoint must hold each tensor of its model once and no others; missing: {_listed(missing)}; "
            f"left over: {_listed(left_over)}. Check that config.json and weights belong together and that no file is absent."
        )
    wrong = [f"{k} {found[k].shape} instead of {s.shape}" for k, s in slots.items() if found[k].shape != s.shape]
    if wrong:
        raise ValueError(f"{source.place}: shapes must be those that config.json implies; got {_listed(wrong)}.")
    wrong = [f"{k} {found[k].dtype}" for k in slots if found[k].dtype not in FLOAT_DTYPES]
    if wrong:
        raise ValueError(
            f"{source.place}: weights must be of dtype {', '.join(FLOAT_DTYPES)}; got {_listed(wrong)}. Use a checkpoint that is "
            "not quantised, or save it in bfloat16 first."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


def _fill(
    spec: jax.ShapeDtypeStruct, keys: Sequence[str], source: TensorSource, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """One parameter, from one tensor, or from one for each index along its leading axes."""
    info = source.tensors[keys[0]]
    stacked = len(spec.shape) - len(info.shape)
    names = np.array(keys, dtype=object).reshape(spec.shape[:stacked])
    parts = _parts(spec, sharding)
    size = [p.stop - p.start for p in parts[0]]
    devices = [] if sharding is None else list(sharding.addressable_devices_indices_map(spec.shape))
    if math.prod(size) * spec.dtype.itemsize * len(set(parts)) <= CHUNK_BYTES:
        arrays = _gathered(spec, source, names, parts)
        if sharding is None:
            return jax.block_until_ready(jnp.array(arrays[0]))  # so that parameters don't accumulate on the host
        placed = [jax.device_put(array, device) for array, device in zip(arrays, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, jax.block_until_ready(placed))
    # All devices of this process are written to at once, in places of their own that are alike, so that one program serves them all.
    local = Mesh(np.array(devices), (_DEVICES,)) if devices else None
    by_device = None if local is None else NamedSharding(local, PartitionSpec(_DEVICES))
    buffer = jnp.zeros([size[0] * len(parts), *size[1:]], spec.dtype, device=by_device)
    for indices in np.ndindex(*size[:stacked]):
        for start, stop in _chunks(info, size[stacked], _distinct_rows(parts, stacked)):
            read = _read(source, names, parts, indices, slice(start, stop))
            pieces = [piece.reshape((1,) * stacked + piece.shape) for _, piece in read]
            rows = pieces[0] if by_device is None else _joined(pieces, devices, by_device)
            place = np.array((*indices, start, *[0] * (len(info.shape) - 1)), np.int32)
            buffer, finite = _write(buffer, rows, place, local)
            if not np.asarray(finite).all():  # also waits for the copy, so that pieces don't accumulate on the host
                raise _not_finite(source, read[int(np.argmin(finite))][0], spec)
    if sharding is None:
        return buffer
    held = {shard.device: shard.data for shard in buffer.addressable_shards}
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, [held[device] for device in devices])


def _gathered(
    spec: jax.ShapeDtypeStruct, source: TensorSource, names: np.ndarray, parts: Sequence[_Part]
) -> list[np.ndarray]:
    """What each device holds, on the host; one array for those that hold the same."""
    distinct = list(dict.fromkeys(parts))
    size = [p.stop - p.start for p in parts[0]]
    arrays = {part: np.empty(size, spec.dtype) for part in distinct}
    for indices in np.ndindex(*size[: names.ndim]):
        read = _read(source, names, distinct, indices, slice(0, size[names.ndim]))
        for array, (name, piece) in zip(arrays.values(), read, strict=True):
            with np.errstate(over="ignore"):
                array[indices] = piece
            if not np.isfinite(array[indices]).all():
                raise _not_finite(source, name, spec)
    return [arrays[part] for part in parts]


def _not_finite(source: TensorSource, name: str, spec: jax.ShapeDtypeStruct) -> ValueError:
    return ValueError(
        f"{source.place}: weights must be finite in {spec.dtype}; {name!r} holds NaN or infinity. The checkpoint is "
        "damaged, or its values do not fit this dtype."
    )


def _parts(spec: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> list[_Part]:
    """What each device of this process holds."""
    indices = [()] if sharding is None else sharding.addressable_devices_indices_map(spec.shape).values()
    whole = [slice(None)] * len(spec.shape)
    return [
        tuple(slice(*i.indices(n)[:2]) for i, n in zip([*(index or ()), *whole], spec.shape, strict=False))
        for index in indices
    ]


def _distinct_rows(parts: Sequence[_Part], stacked: int) -> int:
    """How many pieces are read at once."""
    return len({tuple((p.start, p.stop) for p in part[: stacked + 1]) for part in parts})


def _read(
    source: TensorSource, names: np.ndarray, parts: Sequence[_Part], indices: tuple[int, ...], rows: slice
) -> list[tuple[str, np.ndarray]]:
    """(name of the tensor, values) of the same rows of each device's part; those that several devices hold are read once.

    Args:
      indices: along the leading axes of the part.
      rows: of the part.
    """
    read: dict[tuple[str, int], np.ndarray] = {}
    pieces = []
    for part in parts:
        *leading, first = (p.start + i for p, i in zip(part, (*indices, rows.start), strict=False))
        key = str(names[tuple(leading)])
        if (key, first) not in read:
            read[key, first] = source.read(key, first, first + rows.stop - rows.start)
        pieces.append((key, read[key, first][(slice(None), *part[names.ndim + 1 :])]))
    return pieces


def _joined(pieces: Sequence[np.ndarray], devices: Sequence[Any], sharding: NamedSharding) -> jax.Array:
    """One array whose parts are the pieces, each on its device."""
    placed = [jax.device_put(piece, device) for piece, device in zip(pieces, devices, strict=True)]
    first, *others = pieces[0].shape
    return jax.make_array_from_single_device_arrays((first * len(pieces), *others), sharding, placed)


def _chunks(info: TensorInfo, rows: int, pieces: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows of a part, of which so many pieces are on the host at once."""
    row_bytes = math.prod(info.shape[1:]) * (4 if info.dtype == "F32" else 2) * pieces
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(buffer: jax.Array, rows: jax.Array, place: jax.Array, local: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Writes rows into the buffer in place, on each device into its part; returns it and whether they are finite."""

    def write(buffer: jax.Array, rows: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Without `rounded`, XLA on a GPU tests the values before their conversion.
        finite = jnp.isfinite(rounded(rows.astype(jnp.float32), buffer.dtype)).all()
        return jax.lax.dynamic_update_slice(buffer, rows.astype(buffer.dtype), tuple(place)), finite[None]

    if local is None:
        return write(buffer, rows, place)
    split = PartitionSpec(_DEVICES)
    specs = (split, split, PartitionSpec())
    return jax.shard_map(write, mesh=local, in_specs=specs, out_specs=(split, split))(buffer, rows, place)

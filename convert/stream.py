"""Checkpoint tensors into the parameters of a module, a few rows at a time.

Each parameter is one array on its device from the start; pieces of at most `CHUNK_BYTES` are read, checked and written into it in
place. The host holds at most two pieces, however large the model is, a sharded parameter is never whole in one place, and each process
reads the rows that its devices hold, once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from pallas_kernels.precision import rounded
from seer_jax.convert.formats.sources import TensorSource
from seer_jax.convert.rules import Rule, Slot, expected_slots

CHUNK_BYTES = 16 * 2**20
FLOAT_DTYPES = ("BF16", "F16", "F32")
SHOWN = 8

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


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
    slots = expected_slots(rules, {path: spec.shape for path, spec in parameters.items()})
    _check(slots, source, ignored)
    by_path: dict[str, list[str]] = {path: [] for path in parameters}
    for key, slot in slots.items():
        by_path[slot.path].append(key)  # in the order of layers, and of experts within a layer
    arrays = {
        path: _fill(spec, by_path[path], source, None if sharding is None else sharding(path, spec))
        for path, spec in parameters.items()
    }
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(arrays, sep="."))
    return nnx.merge(graph, state)


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
    stacked = len(spec.shape) - len(source.tensors[keys[0]].shape)
    names = np.array(keys, dtype=object).reshape(spec.shape[:stacked])
    if sharding is None:
        (part,) = _fill_parts(spec, names, source, [_Part.of(spec, (), None)])
        return part
    indices = sharding.addressable_devices_indices_map(spec.shape).items()
    parts = [_Part.of(spec, index or (), jax.sharding.SingleDeviceSharding(device)) for device, index in indices]
    arrays = _fill_parts(spec, names, source, parts)
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one device holds of a parameter.

    Attributes:
      place: the part, as slices of the parameter with start and stop.
      device: None is the default device.
    """

    place: tuple[slice, ...]
    device: jax.sharding.Sharding | None

    @classmethod
    def of(cls, spec: jax.ShapeDtypeStruct, index: tuple[slice, ...], device: jax.sharding.Sharding | None) -> "_Part":
        index = (*index, *[slice(None)] * (len(spec.shape) - len(index)))
        return cls(tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, spec.shape, strict=True)), device)

    def cut(self, indices: tuple[int, ...], start: int, stop: int) -> tuple[tuple[slice, ...], np.ndarray] | None:
        """Which of the rows `start` to `stop` of the tensor at some indices along the leading axes belong to the part, as slices of
        them, and their place in it; None: none."""
        n = len(indices)
        leading, rows = self.place[:n], self.place[n]
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first >= last or not all(p.start <= i < p.stop for p, i in zip(leading, indices, strict=True)):
            return None
        place = np.zeros(len(self.place), np.int32)
        place[: n + 1] = *(i - p.start for p, i in zip(leading, indices, strict=True)), first - rows.start
        return (slice(first - start, last - start), *self.place[n + 1 :]), place


def _fill_parts(
    spec: jax.ShapeDtypeStruct, names: np.ndarray, source: TensorSource, parts: Sequence[_Part]
) -> list[jax.Array]:
    """The parts of a parameter that devices hold, from the tensors of these names, an array over its leading axes.

    Rows that several devices hold are read once; those that none here holds are not read.
    """
    buffers = [jnp.zeros([p.stop - p.start for p in part.place], spec.dtype, device=part.device) for part in parts]
    for indices, key in np.ndenumerate(names):
        for start, stop in _chunks(source, key):
            cuts = [part.cut(indices, start, stop) for part in parts]
            if not any(cuts):
                continue
            first = min(cut[0][0].start for cut in cuts if cut)
            data = source.read(key, start + first, start + max(cut[0][0].stop for cut in cuts if cut))
            checks = []
            for i, cut in enumerate(cuts):
                if cut:
                    (rows, *columns), place = cut
                    rows = data[(slice(rows.start - first, rows.stop - first), *columns)]
                    buffers[i], finite = _write(buffers[i], rows, place)
                    checks.append(finite)
            if not all(checks):  # also waits for the copies, so that pieces don't accumulate on the host
                raise ValueError(
                    f"{source.place}: weights must be finite in {spec.dtype}; {key!r} holds NaN or infinity. The checkpoint is "
                    "damaged, or its values do not fit this dtype."
                )
    return buffers


def _chunks(source: TensorSource, key: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of a tensor's rows."""
    info = source.tensors[key]
    row_bytes = math.prod(info.shape[1:]) * (4 if info.dtype == "F32" else 2)
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, info.shape[0], step):
        yield start, min(start + step, info.shape[0])


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, rows: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes rows into the buffer in place; returns it and whether they are finite."""
    # Without `rounded`, XLA on a GPU tests the values before their conversion.
    finite = jnp.isfinite(rounded(rows.astype(jnp.float32), buffer.dtype)).all()
    rows = rows.astype(buffer.dtype)
    rows = rows.reshape((1,) * (buffer.ndim - rows.ndim) + rows.shape)
    return jax.lax.dynamic_update_slice(buffer, rows, tuple(place)), finite

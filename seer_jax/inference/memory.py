"""The memory that a generation takes, planned before any of it is taken, and what a device has for it."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels.devices import default_device
from seer_jax.inference.host_memory import host_memory
from seer_jax.sharding.on_mesh import cache_shardings

GIB = 2**30
FRACTION, USUAL_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75  # of a GPU's memory, that JAX takes
MOST_FRACTION = 0.95  # the rest is for the driver and libraries
LOWER = "Take fewer rows at a time, shorter prompts, fewer new tokens or a smaller cache_capacity"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a generation takes on its device, or on each device of a mesh, in bytes; printed as a table in GiB.

    Attributes:
      weights: of the base model.
      gates: weights of its gates.
      cache: keys and values of the prompts and the new tokens.
      gate_cache: what gates keep of the past: compressed keys and the pools of unfinished blocks of the decode gate, and where prompts are read
        in chunks the compressed keys of the prefill gate, until the prompts are read.
      scratch: everything else that the compiler lays out for the program: activations, results, copies. None: not compiled.
      available: what the device has for all of this: its limit less what else is in use on it. None: the device does not
        tell.
      held_back: what the device has beside its limit, which JAX's settings keep from this process.
      devices: of the mesh; everything else is of each of them.

    >>> print(MemoryPlan(weights=16 * 2**30, gates=2**25, cache=2**32, gate_cache=2**26, available=20 * 2**30))
    weights                 16.000 GiB
    gates                    0.031 GiB
    cache, keys and values   4.000 GiB
    cache, keys of gates     0.062 GiB
    scratch                not compiled
    total                   20.094 GiB
    available               20.000 GiB
    missing                  0.094 GiB
    """

    weights: int
    gates: int
    cache: int
    gate_cache: int
    scratch: int | None = None
    available: int | None = None
    held_back: int = 0
    devices: int = 1

    def on(self, memory: "DeviceMemory | None") -> "MemoryPlan":
        """The plan held against a device's memory; None: the device does not tell."""
        if memory is None:
            return dataclasses.replace(self, available=None, held_back=0)
        return dataclasses.replace(self, available=memory.free, held_back=memory.held_back)

    @property
    def total(self) -> int:
        """All of it; without scratch where that is not known."""
        return self.weights + self.gates + self.cache + self.gate_cache + (self.scratch or 0)

    @property
    def missing(self) -> int:
        """By how much the total exceeds what is available; 0 where it fits or nothing is known."""
        return 0 if self.available is None else max(self.total - self.available, 0)

    def check(self, lower: str = LOWER) -> None:
        """Raises MemoryError where the plan does not fit the device.

        Args:
          lower: what takes less memory, for the remedy.
        """
        if self.missing:
            parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in self._parts() if size is not None)
            needs = "needs" if self.devices == 1 else f"each of {self.devices} devices needs"
            raise MemoryError(
                f"The generation must fit in device memory: {needs} {self.total / GIB:.3f} GiB ({parts}), "
                f"{(self.available or 0) / GIB:.3f} GiB available. {lower}, or free other memory of the device."
                f"{self._more()}"
            )

    def _more(self) -> str:
        """How to let JAX take enough of the device, where it has enough."""
        whole = (self.available or 0) + self.held_back
        if not self.held_back or self.total > whole - (1 - MOST_FRACTION) * whole:
            return ""
        return (
            f" JAX leaves {self.held_back / GIB:.1f} GiB of it alone: set the environment variable "
            f"{FRACTION}={MOST_FRACTION} before the program starts."
        )

    def __str__(self) -> str:
        lines = [*self._parts(), ("total", self.total)]
        lines += [] if self.available is None else [("available", self.available)]
        lines += [("missing", self.missing)] if self.missing else []
        head = [] if self.devices == 1 else [f"each of {self.devices} devices"]
        return "\n".join(
            head
            + [f"{name:<22} " + ("not compiled" if size is None else f"{size / GIB:>7.3f} GiB") for name, size in lines]
        )

    def _parts(self) -> list[tuple[str, int | None]]:
        return [
            ("weights", self.weights),
            ("gates", self.gates),
            ("cache, keys and values", self.cache),
            ("cache, keys of gates", self.gate_cache),
            ("scratch", self.scratch),
        ]


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes.

    Fields:
      limit: what JAX may take of it.
      in_use: what it holds now.
      held_back: what JAX may not take of it, by its settings.
    """

    limit: int
    in_use: int
    held_back: int = 0

    @property
    def free(self) -> int:
        """What may still be taken."""
        return self.limit - self.in_use


def device_memory(device: Any) -> DeviceMemory | None:
    """What a `jax.Device` tells of its memory, for a CPU what the host has; None where nothing is told."""
    if device.platform == "cpu":
        host = host_memory()
        return None if host is None else DeviceMemory(*host)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    limit = stats["bytes_limit"]
    return DeviceMemory(limit, stats.get("bytes_in_use", 0), _held_back(limit) if device.platform == "gpu" else 0)


def _held_back(limit: int) -> int:
    """What JAX leaves alone of a GPU of which it may take `limit`."""
    text = os.environ.get(FRACTION) or os.environ.get("XLA_CLIENT_MEM_FRACTION")
    try:
        fraction = float(text) if text else USUAL_FRACTION
    except ValueError:
        fraction = 1.0
    return int(limit / fraction) - limit if 0 < fraction < 1 else 0


def available_memory(model: Any) -> DeviceMemory | None:
    """What a model's device has for the model and a generation; in use is only what is not the model's.

    Args:
      model: a pytree of arrays, or of shapes: where they would be put, otherwise the default device counts. That stands also for the
        devices of a mesh that is only planned, unless it is a CPU.

    Returns:
      Of the device, or of that one of several which has the least free. None where one does not tell.
    """
    leaves = jax.tree.leaves(model)
    shardings = [x.sharding for x in leaves if getattr(x, "sharding", None) is not None]
    devices = {device for sharding in shardings for device in sharding.addressable_devices} or {default_device()}
    if getattr(model, "shard", None) is not None and _is_cpu(default_device()):
        return None
    own = dict.fromkeys(devices, 0)
    for x in leaves:
        for part in x.addressable_shards if isinstance(x, jax.Array) else ():
            own[part.device] += part.data.nbytes
    told = {device: device_memory(device) for device in devices}
    free = [_without(memory, own[device]) for device, memory in told.items() if memory is not None]
    if len(free) < len(devices):
        return None
    if all(map(_is_cpu, devices)):  # they share the memory of their host
        shared = _without(next(iter(told.values())), sum(own.values()))
        return shared._replace(limit=shared.limit // len(devices), in_use=shared.in_use // len(devices))
    return min(free, key=lambda memory: memory.free)


def _is_cpu(device: Any) -> bool:
    return device.platform == "cpu"


def _without(memory: Any, size: int) -> DeviceMemory:
    """The memory of a device, in use only what is besides `size` bytes of it."""
    return memory._replace(in_use=max(memory.in_use - size, 0))


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree's arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes that one device has of a pytree's arrays or shapes, which are split by their shardings where they have one."""
    leaves = jax.tree.leaves(tree)
    shapes = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def abstract_argument(x: Any) -> jax.ShapeDtypeStruct:
    """What JAX compiles a program for in place of one leaf of its arguments."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    kind = jax.typeof(x)
    sharding = x.sharding if isinstance(x, jax.Array) and x.committed else None
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding, weak_type=kind.weak_type)


def laid_out_bytes(program: jax.stages.Compiled) -> int | None:
    """What a program takes besides its arguments: scratch, and results in places of their own. None: it does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    return memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def cache_bytes(model: Any, batch: int, capacity: int) -> int:
    """Bytes that one device has of a `Transformer`'s empty cache."""
    return bytes_of_cache(model, jax.eval_shape(lambda: model.make_cache(batch, capacity)))


def bytes_of_cache(model: Any, cache: Any) -> int:
    """Bytes that one device has of a cache of a `Transformer`, which may be one of shapes."""
    if model.layout is None:
        return tree_bytes(cache)
    pairs = zip(jax.tree.leaves(cache), cache_shardings(model.layout, cache), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in pairs)


def check_room(subject: str, model: Any, parts: Mapping[str, int], lower: str) -> None:
    """Checks that a job fits the memory of its device, or of each device of a mesh, as far as that is told.

    Args:
      subject: the job, such as "The evaluation".
      model: of shapes, on a mesh or not; see `available_memory`.
      parts: bytes on each device by what they are for.
      lower: what takes less memory, for the remedy.

    Raises:
      MemoryError: it does not fit.
    """
    memory, needed = available_memory(model), sum(parts.values())
    if memory is not None and needed > memory.free:
        needs = "needs" if model.layout is None else f"each of {model.layout.mesh.size} devices needs"
        listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
        raise MemoryError(
            f"{subject} must fit in device memory: {needs} {needed / GIB:.3f} GiB ({listed}), {memory.free / GIB:.3f} GiB available. {lower}"
        )

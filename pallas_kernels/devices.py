"""Devices of computations, and the GPUs of this process.

Concrete arrays have a device. Tracers have none: the platform of a jitted function is known when it is lowered, after its Python code
has run. So code that depends on the device asks concrete arrays, and uses `jax.lax.platform_dependent` under jit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.backend import get_default_device


def default_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The device of a computation without committed arguments: that of `jax.default_device`, or JAX's first device."""
    return get_default_device()


def device_of(tree: Any) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The device on which a computation with these arguments runs.

    Args:
      tree: a pytree. The first array that is committed to a device decides; if it is sharded, its first device in this process.
        Tracers, uncommitted arrays and other leaves do not decide, as in JAX.

    Returns:
      A device of this process; `default_device()` if no leaf decides.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            local = leaf.sharding.addressable_devices
            if local:
                return min(local, key=lambda device: device.id)
    return default_device()


def is_traced(tree: Any) -> bool:
    """Whether the platform of a computation with these arguments is known only at lowering."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def local_gpus() -> tuple[jax.Device, ...]:  # pyright: ignore[reportInvalidTypeForm]
    """The NVIDIA GPUs of this process, also if JAX's default device is another one."""
    try:
        return tuple(jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX has no such backend here
        return ()


def has_only_cpus() -> bool:
    """Whether CPUs are the only devices of this process."""
    return jax.default_backend() == "cpu" and not local_gpus()


def has_tf32() -> bool:
    """Whether the GPUs of this process have TF32 tensor cores (Ampere and later)."""
    gpus = local_gpus()
    return bool(gpus) and all(float(gpu.compute_capability) >= 8 for gpu in gpus)


@dataclasses.dataclass(frozen=True)
class GpuRequirement:
    """An NVIDIA GPU of one compute capability.

    Args:
      capability: compute capability, such as "9.0".
      examples: GPUs that have it, for messages.
    """

    capability: str
    examples: str

    def why_not(self, device: Any) -> str | None:
        """The reason why a device does not meet this; None if it does."""
        capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
        if capability == self.capability:
            return None
        return self.message(f"{device.device_kind}, {capability}" if capability else device.platform)

    def message(self, found: str) -> str:
        """The reason why a device, described by `found`, does not meet this."""
        return f"needs a GPU of compute capability {self.capability} ({self.examples}); got {found}."

    def is_here(self) -> bool:
        """Whether a GPU of this process meets this."""
        return any(self.why_not(gpu) is None for gpu in local_gpus())


HOPPER = GpuRequirement("9.0", "H100, H200")


@dataclasses.dataclass(frozen=True)
class _Assumed:
    interpret: Any


# A user context is part of the keys of JAX's caches, so that programs compiled under one assumption are not used under another. One
# that is made after a program was compiled would compile it again, so the package imports this module first.
_assumed = jax.make_user_context(None)


@contextlib.contextmanager
def assume_hopper(interpret: Any = None) -> Iterator[None]:
    """Lets kernels for Hopper GPUs be traced on any machine.

    Args:
      interpret: settings of JAX's interpreter (`InterpretGPUParams`), which then runs the kernels; None: they can only be lowered
        (`jax.jit(f).trace(...).lower(lowering_platforms=("cuda",))`).
    """
    with _assumed(_Assumed(interpret)):
        yield


def hopper_is_assumed() -> bool:
    """Whether `assume_hopper` is in force."""
    return _assumed.value is not None


def interpreter() -> Any:
    """The argument `interpret` of kernels."""
    assumed = _assumed.value
    return None if assumed is None else assumed.interpret

"""Which device a computation runs on, and which GPUs this process has.

Concrete arrays are on a device. Tracers are not: a jitted function learns its platform when it is lowered, after its Python code has
run. So what depends on the device is decided from concrete arrays where there are any, and by `jax.lax.platform_dependent` under jit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.backend import get_default_device


def default_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The device of a computation whose arguments are committed to none: `jax.default_device`, or JAX's first device."""
    return get_default_device()


def device_of(tree: Any) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The device on which a computation over these arrays runs.

    Args:
      tree: a pytree. Arrays that are committed to a device decide, the first of their devices where they are sharded. Tracers,
        uncommitted arrays and other leaves decide nothing, since JAX runs them anywhere.

    Returns:
      a device of this process; `default_device()` where no leaf decides.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            local = leaf.sharding.addressable_devices
            if local:
                return min(local, key=lambda device: device.id)
    return default_device()


def is_traced(tree: Any) -> bool:
    """Whether the platform of a computation over these arrays is known only when it is lowered."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def local_gpus() -> tuple[jax.Device, ...]:  # pyright: ignore[reportInvalidTypeForm]
    """The NVIDIA GPUs of this process, on which JAX may run whatever its default device is."""
    try:
        return tuple(jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX has no such backend here
        return ()


def has_only_cpus() -> bool:
    """Whether nothing in this process can run elsewhere than on a CPU."""
    return jax.default_backend() == "cpu" and not local_gpus()


def has_tf32() -> bool:
    """Whether the GPUs of this process multiply in TF32, as NVIDIA's do from Ampere on."""
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
        """What a device lacks, None if nothing."""
        capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
        if capability == self.capability:
            return None
        return self.message(f"{device.device_kind}, {capability}" if capability else device.platform)

    def message(self, found: str) -> str:
        return f"needs a GPU of compute capability {self.capability} ({self.examples}); got {found}."

    def is_here(self) -> bool:
        """Whether a GPU of this process has it."""
        return any(self.why_not(gpu) is None for gpu in local_gpus())


HOPPER = GpuRequirement("9.0", "H100, H200")


@dataclasses.dataclass(frozen=True)
class _Assumed:
    interpret: Any


# Part of the keys of JAX's caches: what is compiled under one assumption is not taken for another. A context that is made after a
# program was compiled would compile it a second time, so the package imports this module at once.
_assumed = jax.make_user_context(None)


@contextlib.contextmanager
def assume_hopper(interpret: Any = None) -> Iterator[None]:
    """Makes kernels for Hopper GPUs traceable on any machine.

    Args:
      interpret: settings of JAX's interpreter (`InterpretGPUParams`), in which they then run; None: for lowering alone
        (`jax.jit(f).trace(...).lower(lowering_platforms=("cuda",))`).
    """
    with _assumed(_Assumed(interpret)):
        yield


def hopper_is_assumed() -> bool:
    """Whether `assume_hopper` is in force."""
    return _assumed.value is not None


def interpreter() -> Any:
    """What a kernel passes on as `interpret`."""
    assumed = _assumed.value
    return None if assumed is None else assumed.interpret

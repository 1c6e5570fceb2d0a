"""Where Mosaic GPU kernels run: on Hopper GPUs, and for tests in JAX's interpreter."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.backends import Unsupported

COMPUTE_CAPABILITY = "9.0"


@dataclasses.dataclass(frozen=True)
class _Assumed:
    interpret: Any


# What is compiled under one assumption is not taken for another. Nor is what was compiled before this context was made: the package
# imports this module at once, or a program's first call would be compiled a second time at its second.
_assumed = jax.make_user_context(None)


@contextlib.contextmanager
def assume_hopper(interpret: Any = None) -> Iterator[None]:
    """Lets Mosaic GPU kernels be traced on any machine.

    Args:
      interpret: run them in JAX's interpreter, with these settings (`InterpretGPUParams`); None: for lowering alone
        (`jax.jit(f).trace(...).lower(lowering_platforms=("cuda",))`).
    """
    with _assumed(_Assumed(interpret)):
        yield


def interpreter() -> Any:
    """What a kernel passes on as `interpret`."""
    assumed = _assumed.value
    return None if assumed is None else assumed.interpret


def require_hopper() -> None:
    """Raises Unsupported unless the default device is a Hopper GPU."""
    if _assumed.value is not None:
        return
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if capability != COMPUTE_CAPABILITY:
        found = f"{device.device_kind}, {capability}" if capability else device.platform
        raise Unsupported(f"needs a GPU of compute capability {COMPUTE_CAPABILITY} (H100, H200); got {found}.")

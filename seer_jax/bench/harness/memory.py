"""What the device has room for, and what a program took of it."""

from typing import Any

import jax
from jax.extend.backend import get_default_device

from seer_jax.inference.memory import GIB, device_memory, laid_out_bytes

MEMORY_SHARE = 0.9  # of the device's memory; the rest is for what programs need besides


def default_device() -> jax.Device:
    """Where measurements draw their arrays: `jax.default_device`, or JAX's first device."""
    return get_default_device()


def memory_limit() -> int | None:
    """Bytes that JAX may use on the device; None where it does not tell."""
    memory = device_memory(default_device())
    return None if memory is None else memory.limit


def too_large(needed: float) -> str | None:
    """Why arrays of that many bytes are not tried here; None where they fit."""
    limit = memory_limit()
    if limit is None or needed <= MEMORY_SHARE * limit:
        return None
    return (
        f"needs {needed / GIB:.1f} GiB; {MEMORY_SHARE:.0%} of the {limit / GIB:.1f} GiB that JAX may use here are "
        f"{MEMORY_SHARE * limit / GIB:.1f} (XLA_PYTHON_CLIENT_MEM_FRACTION sets them)"
    )


def peak_bytes() -> int | None:
    """Most memory in use on the device so far; None where it does not tell."""
    return (default_device().memory_stats() or {}).get("peak_bytes_in_use")


def memory_results(compiled: Any, before: int) -> tuple[dict[str, float | None], str | None]:
    """Results of a program that has run, and a note where its peak is not known.

    Args:
      compiled: the program.
      before: `peak_bytes` before it ran.
    """
    peak = peak_bytes()
    # The device remembers its highest peak alone: what needed more before hides this one.
    own = peak / GIB if peak and peak > before else None
    note = "peak memory: something before needed more" if peak and own is None else None
    planned = compiled.memory_analysis().argument_size_in_bytes + (laid_out_bytes(compiled) or 0)
    return {"peak_gib": own, "planned_gib": planned / GIB}, note

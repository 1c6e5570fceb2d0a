"""Checks that configurations share. A message names the setting, what it must be, and what came."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

MOST = 2**31 - 1  # of numbers that programs hold as int32
MOST_SEED = 2**32 - 1  # JAX keeps 32 bits of a seed


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError where a setting of these names is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive; got {getattr(config, name)}.")


def check_at_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError where a setting of these names is smaller than `least`, or more than an int32 holds."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{type(config).__name__}.{name} must be at least {least}; got {value}.")
        if value > MOST:
            raise ValueError(f"{type(config).__name__}.{name} must be at most {MOST}; got {value}.")


def whole_number(
    name: str, value: Any, must: str = "an integer of at least 1", *, least: int = 1, most: int = MOST
) -> None:
    """Raises ValueError where a value is no integer from `least` to `most`; True and 2.0 are none, NumPy's integers are."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be {must}; got {value!r}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}.")


def check_seed(name: str, value: Any) -> None:
    """Raises ValueError where a value is no seed of JAX's random numbers, of which larger ones would lose bits."""
    whole_number(name, value, "an integer of at least 0", least=0, most=MOST_SEED)


def listed(values: Iterable[Any]) -> str:
    """Values as they are typed, for messages; "none" without any."""
    return ", ".join(map(str, values)) or "none"


def is_placeholder(x: Any) -> bool:
    """Whether a leaf of a pytree stands for a value: inside JAX's transformations, and in trees of shapes, shardings and the like."""
    known = (str, bytes, int, float, complex, list, tuple, dict, np.ndarray, np.generic, jax.Array)
    return isinstance(x, Tracer) or not isinstance(x, known)

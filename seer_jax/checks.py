"""Checks that configurations share. A message names the setting, what it must be, and what came."""

from typing import Any


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError where a setting of these names is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive; got {getattr(config, name)}.")


def check_at_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError where a setting of these names is smaller than `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{type(config).__name__}.{name} must be at least {least}; got {getattr(config, name)}.")

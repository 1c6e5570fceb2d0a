"""A clock that knows what calls take."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest

from seer_jax.bench.harness import clock


@pytest.fixture
def two_milliseconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[..., Any]]]:
    """Every call takes 2 ms; the list holds the functions that were timed, once each."""
    timed: list[Callable[..., Any]] = []

    def fixed(function: Callable[..., Any], arguments: Sequence[Any], calls: int) -> float:
        if function not in timed:
            timed.append(function)
            jax.block_until_ready(function(*arguments))
        return calls * 2e-3

    monkeypatch.setattr(clock, "_run", fixed)
    monkeypatch.setattr(clock, "WARM_UP", 1e-3)
    clock.memory_rate.cache_clear()
    yield timed
    clock.memory_rate.cache_clear()

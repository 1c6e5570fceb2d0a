"""How an operation picks its implementation."""

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_kernels.backends import Operation, Unsupported
from pallas_kernels.devices import assume_hopper

OPERATION = Operation("add", "made_up", preferred=("fast", "steady"), others=("reference",))


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_if_positive(a: int, b: int) -> tuple[str, int]:
        if a < 0:
            raise Unsupported(f"a must not be negative; got {a}.")
        return "fast", a + b

    functions: dict[str, Callable[..., Any]] = {
        "fast": add_if_positive,
        "steady": lambda a, b: ("steady", a + b),
        "reference": lambda a, b: ("reference", a + b),
    }
    for name, function in functions.items():
        module = types.ModuleType(f"made_up.{name}")
        module.__dict__["add"] = function
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_without_a_name_the_first_that_can_runs():
    assert OPERATION(None, 1, b=2) == ("fast", 3)
    assert OPERATION(None, -1, b=2) == ("steady", 1)


@pytest.mark.parametrize("name", ["fast", "steady", "reference"])
def test_a_named_one_runs(name: str):
    assert OPERATION(name, 1, b=2) == (name, 3)


def test_a_named_one_that_cannot_raises():
    with pytest.raises(NotImplementedError, match=r"a must not be negative; got -1"):
        OPERATION("fast", -1, b=2)


def test_none_that_can_raises_every_reason():
    operation = Operation("add", "made_up", preferred=("fast",))
    with pytest.raises(NotImplementedError, match=r"add: no backend can do this. fast: a must not be negative; got -1"):
        operation(None, -1, b=2)


def test_an_error_of_a_backend_is_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    def broken(a: int, b: int) -> None:
        raise NotImplementedError("a rule of JAX that is missing")

    monkeypatch.setattr(sys.modules["made_up.fast"], "add", broken)
    with pytest.raises(NotImplementedError, match="a rule of JAX that is missing"):
        OPERATION(None, 1, b=2)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"add: implementation must be None or one of .*'reference'\); got 'best'"):
        OPERATION("best", 1, b=2)


def test_the_backend_used_here_is_the_first_that_this_device_runs():
    operation = Operation("attend", "made_up", preferred=("mosaic_gpu", "xla"))
    with assume_hopper():
        assert operation.used_here() == "mosaic_gpu"
    if jax.default_backend() == "cpu":
        assert operation.used_here() == "xla"


def test_the_second_call_of_a_program_compiles_nothing():
    """In a fresh interpreter: what the first call imports must not change what JAX tells programs apart by."""
    code = """
import jax, jax.numpy as jnp
from pallas_kernels import score_blocks
traces = []
call = jax.jit(lambda x: traces.append(1) or score_blocks(x, x))
for _ in range(3):
    call(jnp.ones((1, 1024, 1, 64)))
print(len(traces))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "1\n", done.stdout + done.stderr

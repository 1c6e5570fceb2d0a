"""The choice of an operation's implementation: by name, by its arguments, and by their device."""

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices
from pallas_kernels.backends import MOSAIC_GPU, REFERENCE, XLA, Backend, Operation, Unsupported
from pallas_kernels.devices import HOPPER, assume_hopper

FAST, STEADY = Backend("fast"), Backend("steady")
OPERATION = Operation("add", "made_up", preferred=(FAST, STEADY))
# `fast` needs a Hopper GPU. Results tell which backend ran.
FOR_HOPPER = Operation("add", "made_up", preferred=(Backend("fast", HOPPER), STEADY), gradients="add_gradients")


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_if_positive(a: Any, b: Any) -> Any:
        if isinstance(a, int) and a < 0:
            raise Unsupported(f"a must not be negative; got {a}.")
        return a + b + 1000

    functions: dict[str, Callable[..., Any]] = {
        "fast": add_if_positive,
        "steady": lambda a, b: a + b,
        "reference": lambda a, b: a + b + 0.5,
    }
    for name, function in functions.items():
        module = types.ModuleType(f"made_up.{name}")
        module.__dict__["add"] = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["made_up.steady"].__dict__["add_gradients"] = lambda cotangent, a, b: (7 * cotangent,)


def test_without_a_name_the_first_backend_that_can_runs():
    assert OPERATION(None, 1, b=2) == 1003
    assert OPERATION(None, -1, b=2) == 1


@pytest.mark.parametrize(("name", "result"), [("fast", 1003), ("steady", 3), ("reference", 3.5)])
def test_a_named_backend_runs(name: str, result: float):
    assert OPERATION(name, 1, b=2) == result


def test_a_named_backend_that_cannot_raises():
    with pytest.raises(NotImplementedError, match=r"a must not be negative; got -1"):
        OPERATION("fast", -1, b=2)


def test_an_operation_without_a_backend_that_can_raises_every_reason():
    operation = Operation("add", "made_up", preferred=(FAST,))
    with pytest.raises(
        NotImplementedError, match=r"add: no backend takes these arguments. fast: a must not be negative; got -1"
    ):
        operation(None, -1, b=2)


def test_an_error_inside_a_backend_is_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    def broken(a: int, b: int) -> None:
        raise NotImplementedError("a rule of JAX that is missing")

    monkeypatch.setattr(sys.modules["made_up.fast"], "add", broken)
    with pytest.raises(NotImplementedError, match="a rule of JAX that is missing"):
        OPERATION(None, 1, b=2)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"add: implementation must be None or one of .*'reference'\); got 'best'"):
        OPERATION("best", 1, b=2)


@pytest.mark.cpu
class TestOnAMachineWithoutGpus:
    def test_a_backend_for_gpus_is_passed_over(self):
        assert FOR_HOPPER(None, jnp.ones(()), 1.0) == 2

    def test_programs_do_not_depend_on_the_platform(self):
        jaxpr = str(jax.make_jaxpr(lambda a: FOR_HOPPER(None, a, 1.0))(jnp.ones(())))
        assert "platform" not in jaxpr and "1000" not in jaxpr

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
    def test_a_named_backend_for_gpus_raises(self, transform: Callable):
        with pytest.raises(Unsupported, match=r"needs a GPU of compute capability 9.0 \(H100, H200\); got cpu"):
            transform(lambda a: FOR_HOPPER("fast", a, 1.0))(jnp.ones(()))

    def test_the_backend_used_here_is_the_one_for_any_device(self):
        assert FOR_HOPPER.used_here() == "steady"
        with assume_hopper():
            assert FOR_HOPPER.used_here() == "fast"


@pytest.mark.cpu
class TestOnACpuBesideAHopperGpu:
    """Arrays are on a CPU, so that the backend for all devices runs, under every transformation."""

    @pytest.mark.parametrize("committed", [True, False])
    def test_eager_calls(self, hopper: Any, committed: bool):
        a = jnp.ones(())
        assert FOR_HOPPER(None, jax.device_put(a, jax.devices("cpu")[0]) if committed else a, 1.0) == 2

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: lambda a: f(a[0])[None],
            jax.jit,
            jax.vmap,
            lambda f: jax.jit(jax.vmap(f)),
            lambda f: jax.vmap(lambda a: jax.jvp(jnp.sin, (f(a),), (a,))[0]),
            lambda f: lambda a: jax.lax.map(f, a),
            lambda f: jax.jit(lambda a: jax.lax.scan(lambda c, x: (c, f(x)), None, a)[1]),
        ],
        ids=["eager", "jit", "vmap", "jit of vmap", "inside a function", "map", "scan"],
    )
    def test_transformed_calls(self, hopper: Any, transform: Callable):
        def call(a: jax.Array) -> jax.Array:
            return FOR_HOPPER(None, a, 1.0)

        got = transform(call)(jnp.ones(1))
        assert float(got[0]) < 3

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_gradients_come_from_the_rule(self, hopper: Any, transform: Callable):
        """Those of the backend for GPUs and of the one for all devices."""
        gradient = transform(jax.value_and_grad(lambda a: FOR_HOPPER(None, a, 1.0)))
        assert tuple(map(float, gradient(jnp.ones(())))) == (2, 7)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_a_backend_may_have_gradients_of_its_own(
        self, hopper: Any, monkeypatch: pytest.MonkeyPatch, transform: Callable
    ):
        """Which run where it runs, and here those of the backend for all devices."""
        own = lambda cotangent, a, b: (9 * cotangent,)  # noqa: E731
        monkeypatch.setattr(sys.modules["made_up.fast"], "add_gradients", own, raising=False)
        gradient = transform(jax.value_and_grad(lambda a: FOR_HOPPER(None, a, 1.0)))
        assert tuple(map(float, gradient(jnp.ones(())))) == (2, 7)
        with assume_hopper(interpret=True):
            assert tuple(map(float, gradient(jnp.ones(())))) == (1002, 9)

    def test_the_default_device_is_honoured(self, hopper: Any):
        for device in jax.devices("cpu"):
            with jax.default_device(device):
                out = jax.jit(lambda a: FOR_HOPPER(None, a, jnp.ones(())))(jnp.ones(()))
                assert float(out) == 2 and out.devices() == {device}
                assert devices.default_device() == device

    def test_a_named_backend_for_gpus_raises(self, hopper: Any):
        with pytest.raises(Unsupported, match=r"needs a GPU of compute capability 9.0 .*; got cpu"):
            FOR_HOPPER("fast", jnp.ones(()), 1.0)

    def test_a_named_backend_for_gpus_raises_when_a_program_is_lowered(self, hopper: Any):
        traced = jax.jit(lambda a: FOR_HOPPER("fast", a, 1.0)).trace(jnp.ones(()))
        with pytest.raises(Unsupported, match=r"needs a GPU of compute capability 9.0 .*; got cpu"):
            traced.lower()
        assert "1.000000e+03" in traced.lower(lowering_platforms=("cuda",)).as_text()

    def test_arguments_that_the_backend_for_gpus_refuses_go_to_the_next(self, hopper: Any):
        assert jax.jit(lambda b: FOR_HOPPER(None, -1, b))(jnp.ones(())) == 0
        with pytest.raises(Unsupported, match=r"a must not be negative; got -1"):
            jax.jit(lambda b: FOR_HOPPER("fast", -1, b))(jnp.ones(()))


@pytest.mark.cpu
class TestOnAHopperGpu:
    def test_a_program_for_a_platform_contains_its_backend_alone(self, hopper: Any):
        traced = jax.jit(jax.vmap(lambda a: FOR_HOPPER(None, a, 1.0))).trace(jnp.ones(3))
        for platform, is_fast in (("cpu", False), ("cuda", True)):
            assert ("1.000000e+03" in traced.lower(lowering_platforms=(platform,)).as_text()) == is_fast
        assert "conditional" not in str(traced.lower().compile().as_text())

    def test_arrays_that_are_on_it_are_not_traced_for_other_devices(self, hopper: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(devices, "device_of", lambda tree: hopper)
        monkeypatch.setattr(sys.modules["made_up.steady"], "add", None)
        assert FOR_HOPPER(None, jnp.ones(()), 1.0) == 1002

    def test_the_backend_used_here_is_that_of_the_device(self, hopper: Any, monkeypatch: pytest.MonkeyPatch):
        assert FOR_HOPPER.used_here() == "steady"
        monkeypatch.setattr(devices, "device_of", lambda tree: hopper)
        assert FOR_HOPPER.used_here() == "fast"

    def test_an_older_gpu_is_not_used(self, hopper: Any, monkeypatch: pytest.MonkeyPatch):
        hopper.compute_capability, hopper.device_kind = "8.0", "NVIDIA A100"
        monkeypatch.setattr(devices, "device_of", lambda tree: hopper)
        assert jax.jit(lambda a: FOR_HOPPER(None, a, 1.0))(jnp.ones(())) == 2
        with pytest.raises(Unsupported, match=r"needs a GPU of compute capability 9.0 .*; got NVIDIA A100, 8.0"):
            jax.jit(lambda a: FOR_HOPPER("fast", a, 1.0))(jnp.ones(()))


def test_the_operations_prefer_their_kernels():
    operation = Operation("attend", "made_up")
    assert operation.preferred == (MOSAIC_GPU, XLA) and operation.others == (REFERENCE,)


def test_the_second_call_of_a_program_compiles_nothing():
    """In a new process: imports during the first call must not change the keys of JAX's caches."""
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

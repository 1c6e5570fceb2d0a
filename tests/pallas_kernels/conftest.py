"""Fixtures of the kernels' tests; registers the suites, which are no test modules, for pytest's explanations of assertions."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # JAX's only interface to the races found
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.devices import assume_hopper

for module in Path(__file__).parent.glob("suites/*.py"):
    pytest.register_assert_rewrite(f"tests.pallas_kernels.suites.{module.stem}")


# Of the interpreter's tests, which take seconds each, and the definition's, which are XLA's too, these run always: what a kernel computes,
# and that padding stays out of it.
ALWAYS = {
    "TestMosaicGpuInterpreted": (
        "test_errs_no_more",
        "test_follows_the_rule[",
        "test_gradients_err_no_more_than_those_of_plain_attention[",
        "test_padding",
    ),
    "TestReference": ("test_is_", "test_one_vector"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves slow tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the others slow."""
    for item in items:
        always = ALWAYS.get(getattr(getattr(item, "cls", None), "__name__", ""))
        if always and not item.name.startswith(always):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly: None, exact_products: None) -> None:
    """Every module here compiles many small programs, and compares with plain attention in float32."""


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Runs Mosaic GPU kernels in JAX's interpreter, and fails if it detects a race."""
    # The interpreter's threads must compute on the kernel's device. They see JAX's global settings, not the contexts of this thread.
    default_device = jax.config.jax_default_device
    jax.config.update("jax_default_device", jax.devices()[0])
    try:
        with assume_hopper(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        races = interpret_pallas_call.get_races()
        assert races is None or not races.races_found
    finally:
        jax.config.update("jax_default_device", default_device)
        interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this process seem to have a Hopper GPU besides its CPUs."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200", core_count=132)
    monkeypatch.setattr(devices, "local_gpus", lambda: (gpu,))
    jax.clear_caches()  # of programs that were traced without it
    yield gpu
    jax.clear_caches()

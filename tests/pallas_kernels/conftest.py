"""Lets pytest explain the assertions of the suites, which are no test modules themselves."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # the one place that tells of races
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.devices import assume_hopper

for path in (Path(__file__).parent / "suites").glob("*.py"):
    pytest.register_assert_rewrite(f"tests.pallas_kernels.suites.{path.stem}")


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly: None, exact_products: None) -> None:
    """Every module here compiles many small programs, and compares with plain attention in float32."""


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Runs Mosaic GPU kernels in JAX's interpreter, and fails where it sees a race."""
    # The interpreter's threads must compute on the device of the kernel. They see settings for all threads, not contexts.
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
    """A Hopper GPU that this process seems to have beside its CPU."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200", core_count=132)
    monkeypatch.setattr(devices, "local_gpus", lambda: (gpu,))
    jax.clear_caches()  # of programs that were traced without it
    yield gpu
    jax.clear_caches()

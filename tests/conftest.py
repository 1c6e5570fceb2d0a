"""Fixtures for every folder. Settings that must come before any import are in the conftest.py above."""

import os
from collections.abc import Iterator

import jax
import jaxtyping
import pytest


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For tests that compile many programs and run each for a moment.

    On a GPU, and where SEER_JAX_TEST_OPTIMIZED is set (make test-kernels), the programs are what users run.
    """
    quickly = jax.default_backend() == "cpu" and not os.environ.get("SEER_JAX_TEST_OPTIMIZED")
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def exact_products() -> Iterator[None]:
    """For tests that hold a float32 base model, or plain attention, to float32 bounds: a GPU would multiply in TF32.

    Not for what promises float32 by itself: there it would hide a product that leaves its precision to the device.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Each compiled program holds pages of memory, and a process may hold so many: XLA crashes when they run out."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong arguments through to the library's own checks, as outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

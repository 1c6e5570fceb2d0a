"""Settings that hold for every test; they must be made before JAX or the packages under test are imported."""

import importlib.util
import os
from collections.abc import Iterator

# The CPU unless a GPU is asked for: SEER_JAX_TEST_PLATFORM=cuda make test EXTRA=cuda13
os.environ["JAX_PLATFORMS"] = os.environ.get("SEER_JAX_TEST_PLATFORM", "cpu")
# Warpgroups of an interpreted kernel that wait for each other each take one of XLA's threads, of which two cores would have too few.
os.environ.setdefault("PJRT_NPROC", "4")
# Two devices, as a host with two GPUs has them: what takes the first device where the arguments say another one fails.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
# No test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Not the first one, so that code which takes jax.devices()[0] meets arrays of another device.
jax.config.update("jax_default_device", jax.devices()[-1])

# Shapes and types of the public signatures are checked at every call, in tests alone.
if importlib.util.find_spec("beartype"):
    import tests.typechecker  # noqa: F401 - bound before the hook asks for it by name

    jaxtyping.install_import_hook(["pallas_kernels", "seer_jax"], "tests.typechecker.check")

# Tracing and compiling make the first example slow, whatever it is; the same examples come at every run.
hypothesis.settings.register_profile("seer_jax", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("seer_jax")


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For tests that compile many programs and run each for a moment; on a GPU the programs are what users run."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that are for another device."""
    other, reason = ("cpu", "for a CPU") if jax.default_backend() == "gpu" else ("gpu", "for an NVIDIA GPU")
    skip = pytest.mark.skip(reason=f"{reason} (SEER_JAX_TEST_PLATFORM)")
    for item in items:
        if item.get_closest_marker(other):
            item.add_marker(skip)

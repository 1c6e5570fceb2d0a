"""Settings of every test, made before JAX or a package under test is imported; and the examples in docstrings as tests."""

import doctest
import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The CPU unless a GPU is asked for: make test-gpu.
os.environ["JAX_PLATFORMS"] = os.environ.get("SEER_JAX_TEST_PLATFORM", "cpu")
# Up to four warpgroups of an interpreted kernel wait for each other, and the program that started them for all: each takes one of XLA's
# threads, which would otherwise be as many as cores. Where none is left, all wait for ever.
os.environ.setdefault("PJRT_NPROC", "8")
# Four CPU devices, as a host with four GPUs has them.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
# No test may write into the user's cache.
os.environ["SEER_JAX_COMPILATION_CACHE"] = "off"
# No test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two thirds of the tests' time is compiling. The workers, the processes that tests start, and later runs share what is compiled;
# `make clean` removes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests.browser import find_browser
from tests.packaging.checkout import PACKAGES, RECIPE, ROOT

jax.config.update("jax_numpy_rank_promotion", "raise")
# Not the first device, so that code which takes the first one, whatever its arguments say, meets arrays of another.
jax.config.update("jax_default_device", jax.devices()[-1])

# Shapes and types of the public signatures are checked at every call, in tests alone.
if importlib.util.find_spec("beartype"):
    import tests.typechecker  # noqa: F401 - bound before the hook asks for it by name

    jaxtyping.install_import_hook(["pallas_kernels", "seer_jax"], "tests.typechecker.check")

# Tracing and compiling make the first example slow, whatever it is; the same examples come at every run.
hypothesis.settings.register_profile("seer_jax", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("seer_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that are for another device or for more of them, and outside of CI those that need a browser where there is none."""
    if find_browser() is None and not os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="for Chromium (make browser)"))
    other, reason = ("cpu", "for a CPU") if jax.default_backend() == "gpu" else ("gpu", "for an NVIDIA GPU")
    skip = pytest.mark.skip(reason=f"{reason} (SEER_JAX_TEST_PLATFORM)")
    for item in items:
        mesh = item.get_closest_marker("mesh")
        devices = mesh.args[0] if mesh and mesh.args else 4
        if item.get_closest_marker(other):
            item.add_marker(skip)
        elif mesh and jax.device_count() < devices:
            item.add_marker(pytest.mark.skip(reason=f"for {devices} devices"))


def pytest_collection_finish() -> None:
    """Garbage is looked for less often and not among what is imported: that took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


class Examples(pytest.Module):
    """The examples in the docstrings of one module, imported by the name that it installs as."""

    def collect(self) -> Iterator[pytest.DoctestItem]:
        folder, *names = self.path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join([PACKAGES[folder], *names]).removesuffix(".__init__"))
        runner = doctest.DebugRunner(verbose=False)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            if test.examples:
                settings: dict[str, Any] = dict(parent=self, name=test.name, runner=runner, dtest=test)
                yield pytest.DoctestItem.from_parent(**settings)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Examples | None:
    """Looks for examples in the files that have any; importing all others would take longer than the examples."""
    path = file_path.relative_to(ROOT)
    if (
        path.suffix != ".py"
        or path.parts[0] not in PACKAGES
        or RECIPE in path.parents
        or ">>>" not in file_path.read_text()
    ):
        return None
    return Examples.from_parent(parent, path=file_path)


@pytest.fixture(autouse=True)
def names_of_examples(doctest_namespace: dict[str, object]) -> None:
    """What an example need not import."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np)

"""Tests of this folder hold float32 base models to float32 bounds. Runs of tests share compiled programs."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from tests.train.runs import run_to


@pytest.fixture(scope="module", autouse=True)
def products(exact_products: None) -> None:
    """As a user who compares models asks for them."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compilation_cache(compiled):
    """Most runs here are of the same program, which takes seconds to compile; processes of the tests share it too."""
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compile_quickly, compilation_cache):
    """(folder, result) of the run that others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_to(folder)

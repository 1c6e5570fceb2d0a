"""The examples in docstrings run and give what they show."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.packaging.checkout import modules

WITH_EXAMPLES = [name for name, path in modules().items() if ">>>" in path.read_text()]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module: str):
    names = {"jax": jax, "jnp": jnp, "np": np}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.attempted and not result.failed

"""New weights have the numbers that `jax.random.normal` draws."""

import jax
import numpy as np
import pytest

from seer_jax.draws import standard_normal


@pytest.mark.parametrize("shape", [(5,), (2, 1, 3, 4)])
def test_numbers_are_those_of_jax(shape: tuple[int, ...]):
    keys = jax.random.split(jax.random.key(7), 2)
    for key in keys:
        np.testing.assert_array_equal(standard_normal(key, shape), jax.random.normal(key, shape))
    of_each = jax.vmap(lambda key: standard_normal(key, shape))(keys)
    np.testing.assert_array_equal(of_each, [jax.random.normal(key, shape) for key in keys])

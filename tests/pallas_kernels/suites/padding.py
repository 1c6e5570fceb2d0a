"""What every operation promises of padding: whatever lies there, NaN and infinity too, reaches no result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels.suites.comparison import assert_bitwise_equal

# The interpreter multiplies in NumPy, which warns of NaN in entries that are hidden afterwards.
products_of_padding = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def behind(lengths: Any, size: int, offset: Any = 0) -> np.ndarray:
    """[B, size]: which positions, counted from `offset` on, lie behind the end of their row."""
    positions = np.atleast_1d(np.asarray(offset))[:, None] + np.arange(size)[None]
    return positions >= np.asarray(lengths)[:, None]


class IgnoresPadding:
    """Part of each suite, whose `run` it calls."""

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Arguments of a call, and for each array that has padding which leading entries are padding."""
        raise NotImplementedError

    def told(self, result: Any) -> Any:
        """The parts of a result that mean something; all of it unless the operation says otherwise."""
        return result

    def run(self, **arguments: Any) -> Any:
        raise NotImplementedError

    @products_of_padding
    def test_padding_reaches_no_result(self):
        """Bit by bit what zeros in its place give."""
        arguments, padding = self.padded()
        assert padding and all(mask.any() and not mask.all() for mask in padding.values())

        def filled(*values: float) -> Any:
            changed = {name: fill(arguments[name], mask, values) for name, mask in padding.items()}
            return self.told(self.run(**arguments | changed))

        assert_bitwise_equal(filled(0.0), filled(np.nan, np.inf, -np.inf))


def fill(x: Any, mask: np.ndarray, values: tuple[float, ...]) -> jax.Array:
    """An array with these values, in turn, in the entries of the mask over its leading axes."""
    x = jnp.asarray(x)
    values_there = jnp.resize(jnp.asarray(values, x.dtype), x.shape)
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), values_there, x)

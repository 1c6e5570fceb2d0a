"""Conformance suite of `stacked_linear`."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import stacked_linear
from pallas_kernels.backends import Implementation
from pallas_kernels.stacked_linear.cases import TINY, Case
from tests.pallas_kernels.suites.comparison import (
    KEY,
    array,
    assert_as_good_as,
    assert_bitwise_equal,
    compare_with_sharded,
)
from tests.pallas_kernels.suites.padding import IgnoresPadding


@functools.cache
def compiled(implementation: Implementation) -> Callable[..., list[jax.Array]]:
    return jax.jit(functools.partial(stacked_linear, implementation=implementation))


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return Case("padded", 256, (64, 128), rows=3).arguments(KEY), {"x": np.asarray([False, True, False])}

    def told(self, result: Any) -> Any:
        """A vector is its own row's alone."""
        return [y[np.asarray([0, 2])] for y in result]

    def run(self, **arguments: Any) -> list[jax.Array]:
        return compiled(self.implementation)(**arguments)

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_errs_no_more_than_a_plain_product(self, case: Case):
        arguments = case.arguments(KEY)
        got = self.run(**arguments)
        assert len(got) == len(case.outputs)
        x, layer = arguments["x"], int(arguments["layer"])
        for w, y in zip(arguments["weights"], got, strict=True):
            truth = array(x) @ array(w[layer]).T
            assert_as_good_as(jnp.asarray(truth, x.dtype), y, truth)

    def test_gradients(self):
        case = Case("gradients", 128, (64, 128), rows=2, layers=3)
        x, weights, layer = (case.arguments(KEY)[name] for name in ("x", "weights", "layer"))
        call = functools.partial(stacked_linear, layer=layer, implementation=self.implementation)
        loss = jax.jit(jax.grad(lambda x, weights: sum(y.astype("float32").sum() for y in call(x, weights)), (0, 1)))
        in_x, in_weights = loss(x, weights)
        np.testing.assert_allclose(
            array(in_x),
            np.stack([array(w[layer]).sum(0) for w in weights]).sum(0)[None].repeat(2, 0),
            rtol=0.02,
            atol=0.1,
        )
        for w, got in zip(weights, in_weights, strict=True):
            expected = np.zeros(w.shape)
            expected[int(layer)] = array(x).sum(0)
            np.testing.assert_allclose(array(got), expected, rtol=0.01, atol=0.01)

    def test_reads_no_other_layer(self):
        arguments = Case("poisoned", 256, (64, 64), layers=4).arguments(KEY)
        clean = self.run(**arguments)
        others = (jnp.arange(4) != arguments["layer"])[:, None, None]
        poisoned = [jnp.where(others, jnp.nan, w) for w in arguments["weights"]]
        assert_bitwise_equal(clean, self.run(**arguments | {"weights": poisoned}))

    def test_runs_under_shard_map(self):
        """Each device has outputs of its own."""
        arguments = Case("sharded", 128, (128, 256), rows=2).arguments(KEY)
        specs = {"weights": P(None, "model")}
        compare_with_sharded(self.run, arguments, specs, P(None, "model"))

    def test_scans_over_layers(self):
        """As in a decoder's loop; results of a vector do not depend on the others."""
        arguments = Case("scanned", 128, (128,), rows=2, layers=3).arguments(KEY)
        weights = arguments["weights"]

        def layer(x, i):
            return stacked_linear(x, weights, i, implementation=self.implementation)[0], None

        for x in (arguments["x"], arguments["x"][:1]):
            scanned = jax.jit(lambda x: jax.lax.scan(layer, x, jnp.arange(3))[0])(x)
            alone = x
            for i in range(3):
                (alone,) = self.run(x=alone, weights=weights, layer=jnp.int32(i))
            np.testing.assert_allclose(array(scanned), array(alone), rtol=2**-6, atol=2**-6)

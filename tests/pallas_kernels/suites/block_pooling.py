"""Conformance suite of `pool_blocks`."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import pool_blocks
from pallas_kernels.backends import Implementation
from pallas_kernels.block_pooling.cases import KEYS, TINY, Case
from tests.pallas_kernels.suites.comparison import KEY, array, assert_within_rounding, compare_with_sharded
from tests.pallas_kernels.suites.padding import IgnoresPadding

_compiled = jax.jit(pool_blocks, static_argnames=("kinds", "block_size", "implementation"))


def pooled_by_hand(x: Any, kinds: tuple[str, ...], *, block_size: int, valid: Any = None) -> np.ndarray:
    """Pooled vectors by the rule of `pool_blocks`, block by block."""
    x = array(x)
    batch, tokens, heads, dim = x.shape
    valid = np.broadcast_to(True if valid is None else np.asarray(valid), (batch, tokens))
    blocks = -(-tokens // block_size)
    pooled = np.zeros((batch, blocks, heads, len(kinds), dim))
    pool = {"max": np.max, "min": np.min, "avg": np.mean}
    for sequence, block in np.ndindex(batch, blocks):
        here = slice(block * block_size, (block + 1) * block_size)
        counted = x[sequence, here][valid[sequence, here]]
        for i, kind in enumerate(kinds):
            if len(counted):
                pooled[sequence, block, :, i] = pool[kind](counted, axis=0)
    return pooled.reshape(batch, blocks, heads, -1)


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        arguments = Case("ragged", 4, 64, 70, KEYS, batch=2, lengths=(70, 40), block_size=32).arguments(KEY)
        return arguments, {"x": ~np.asarray(arguments["valid"])}

    def run(self, x: Any, kinds: tuple[str, ...], **arguments: Any) -> jax.Array:
        return _compiled(x, kinds, **arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_follows_the_rule(self, case: Case):
        arguments = case.arguments(KEY)
        got = self.run(**arguments)
        assert got.dtype == jnp.float32
        assert_within_rounding(got, pooled_by_hand(**arguments))

    def test_invalid_tokens_have_no_influence(self):
        """Any values at any positions, with `valid` shared by all sequences."""
        x = jax.random.normal(KEY, (2, 80, 4, 64))
        valid = jax.random.bernoulli(KEY, 0.5, (1, 80)).at[0, 16:32].set(True).at[0, 32:48].set(False)
        hidden = jnp.where(valid[..., None, None], x, jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1e9])[:, None])
        got = self.run(hidden, KEYS, block_size=16, valid=valid)
        assert_within_rounding(got, pooled_by_hand(x, KEYS, block_size=16, valid=valid))


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: its gradients, and transformations."""

    def test_gradients(self):
        arguments = Case("ragged", 4, 64, 70, KEYS, batch=2, lengths=(70, 40), block_size=32).arguments(KEY)
        x, kinds = arguments.pop("x").astype("float32"), arguments.pop("kinds")

        def loss(implementation: Implementation):
            return lambda x: (pool_blocks(x, kinds, **arguments, implementation=implementation) ** 2).sum()

        got, truth = (jax.jit(jax.grad(loss(name)))(x) for name in (self.implementation, "reference"))
        assert_within_rounding(got, truth)

    def test_runs_under_shard_map(self):
        """Each device has heads of its own."""
        run = functools.partial(self.run, kinds=KEYS, block_size=16)
        heads = P(None, None, "model")
        compare_with_sharded(run, {"x": jax.random.normal(KEY, (2, 40, 8, 64))}, {"x": heads}, heads)

    def test_maps(self):
        x = jax.random.normal(KEY, (3, 1, 32, 4, 64))
        mapped = jax.vmap(lambda x: pool_blocks(x, ("max",), block_size=16, implementation=self.implementation))(x)
        assert_within_rounding(mapped[:, 0], pooled_by_hand(x[:, 0], ("max",), block_size=16))

"""Conformance suite of `score_blocks`."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import score_blocks
from pallas_kernels.backends import Implementation
from pallas_kernels.gate_scores.cases import TINY, Case
from tests.pallas_kernels.suites.comparison import KEY, array, compare_with_sharded
from tests.pallas_kernels.suites.padding import IgnoresPadding, behind

PADDED_LENGTHS = (60, 70)

_compiled = jax.jit(score_blocks, static_argnames=("scale", "causal", "implementation"))


def scores_by_hand(queries: Any, keys: Any, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B, H, T, Sb] in float64, and the products of their vectors' norms."""
    queries, keys = array(queries), array(keys)
    keys = keys.repeat(queries.shape[2] // keys.shape[2], axis=2)
    norms = (np.linalg.norm(x, axis=-1) for x in (queries, keys))
    scores, bounds = np.einsum("bthc,bjhc->bhtj", queries, keys), np.einsum("bth,bjh->bhtj", *norms)
    return scale * scores, abs(scale) * bounds


def assert_accurate(
    got: jax.Array, queries: Any, keys: Any, *, causal: bool, scale: float | None = None, row_offset: int = 0
) -> None:
    truth, bounds = scores_by_hand(queries, keys, queries.shape[-1] ** -0.5 if scale is None else scale)
    needed = np.tril(np.ones(truth.shape, bool), k=int(row_offset)) | (not causal)
    assert got.dtype == jnp.float32 and got.shape == truth.shape
    assert (np.abs(array(got) - truth)[needed] <= 1e-6 * bounds[needed]).all()


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        blocks = behind(PADDED_LENGTHS, 70)
        return Case("padded", 4, 2, 64, 70, 70, batch=2).arguments(KEY), {"queries": blocks, "keys": blocks}

    def told(self, result: Any) -> Any:
        """Scores of padding are its own, and entries above the diagonal hold anything."""
        return [jnp.tril(scores[:, :length, :length]) for scores, length in zip(result, PADDED_LENGTHS, strict=True)]

    def run(self, queries: Any, keys: Any, **arguments: Any) -> jax.Array:
        return _compiled(queries, keys, **arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_is_accurate_to_float32(self, case: Case):
        arguments = case.arguments(KEY)
        assert_accurate(self.run(**arguments), **arguments)

    def test_chunks_of_rows(self):
        """In a scan, so that the offset is traced; it is not a multiple of a tile."""
        arguments = Case("chunks", 2, 1, 64, 140, 140).arguments(KEY)
        queries, keys = arguments["queries"], arguments["keys"]

        def chunk(i: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(queries, 70 * i, 70, axis=1)
            return score_blocks(rows, keys, causal=True, row_offset=70 * i, implementation=self.implementation)

        got = jax.jit(lambda: jax.lax.map(chunk, jnp.arange(2)))()
        assert_accurate(jnp.concatenate(list(got), axis=2), queries, keys, causal=True)

    def test_heads_of_any_magnitude(self):
        """Each head has its own magnitude; one is zero throughout."""
        arguments = Case("heads", 4, 2, 64, 70, 70).arguments(KEY)
        factors = jnp.asarray([1.0, 1e-20, 0.0, 1e15])[None, None, :, None]
        arguments["queries"] *= factors
        assert_accurate(self.run(**arguments, scale=3.0), **arguments, scale=3.0)


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: its gradients, and transformations."""

    @pytest.mark.parametrize("offset", [0, 25])
    def test_gradients(self, offset: int):
        arguments = Case("gradients", 4, 2, 64, 70, 100).arguments(KEY)

        def loss(implementation: Implementation):
            def square(queries: jax.Array, keys: jax.Array) -> jax.Array:
                scores = score_blocks(queries, keys, causal=True, row_offset=offset, implementation=implementation)
                return (jnp.where(jnp.tril(jnp.ones((1, 1, 70, 100), bool), k=offset), scores, 0) ** 2).sum()

            return jax.jit(jax.grad(square, argnums=(0, 1)))

        gradients = [loss(name)(arguments["queries"], arguments["keys"]) for name in (self.implementation, "reference")]
        for got, truth in zip(*gradients, strict=True):
            np.testing.assert_allclose(got, truth, rtol=0, atol=4e-6 * float(jnp.abs(truth).max()))

    def test_runs_under_shard_map(self):
        """Each device has heads of its own."""
        arguments = Case("sharded", 4, 2, 64, 64, 64).arguments(KEY)
        arrays = {name: arguments[name] for name in ("queries", "keys")}
        compare_with_sharded(self.run, arrays, dict.fromkeys(arrays, P(None, None, "model")), P(None, "model"))

    def test_maps(self):
        arguments = Case("mapped", 2, 2, 64, 64, 64, batch=3).arguments(KEY)
        queries, keys = arguments["queries"], arguments["keys"]
        one = jax.vmap(lambda q, k: score_blocks(q[None], k[None], implementation=self.implementation)[0])
        assert_accurate(one(queries, keys), queries, keys, causal=False)

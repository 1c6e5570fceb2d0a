"""Conformance suite of `score_sub_blocks`."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import score_sub_blocks
from pallas_kernels.backends import Implementation
from pallas_kernels.sub_block_scores.cases import TINY, Case
from tests.pallas_kernels.suites.comparison import KEY, array, assert_within_rounding, compare_with_sharded
from tests.pallas_kernels.suites.padding import IgnoresPadding

SETTINGS = ("queries_per_row", "keys_per_block", "join", "heads", "scale", "implementation")
_compiled = jax.jit(score_sub_blocks, static_argnames=SETTINGS)


def scores_by_hand(
    *, queries: Any, keys: Any, seen: Any, queries_per_row: int, keys_per_block: int, join: str, heads: str
) -> tuple[np.ndarray, float]:
    """Scores in float64, and the largest product of the norms of two vectors, scaled."""
    queries, keys, scale = array(queries), array(keys), queries.shape[-1] ** -0.5
    (batch, vectors, num_heads, _), (_, num_keys, kv_heads, _) = queries.shape, keys.shape
    keys, seen = keys.repeat(num_heads // kv_heads, axis=2), np.broadcast_to(seen, (batch, vectors, 2))
    rows, blocks = (range(0, n, size) for n, size in ((vectors, queries_per_row), (num_keys, keys_per_block)))
    shares = np.zeros((batch, num_heads, vectors, len(blocks)))
    for b, u in np.ndindex(batch, vectors):
        first, end = seen[b, u]
        if end <= first:
            continue
        logits = scale * np.einsum("hc,whc->hw", queries[b, u], keys[b, first:end])
        weights = np.zeros((num_heads, num_keys))
        weights[:, first:end] = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        reduce = np.sum if join == "sum" else np.max
        shares[b, :, u] = np.stack([reduce(weights[:, j : j + keys_per_block], axis=1) for j in blocks], axis=1)
    if heads != "each":
        reduce = np.mean if heads == "mean" else np.max
        shares = reduce(shares.reshape(batch, kv_heads, -1, vectors, len(blocks)), axis=2)
    largest = np.stack([shares[:, :, i : i + queries_per_row].max(2) for i in rows], axis=2)
    norms = (np.linalg.norm(x, axis=-1).max() for x in (queries, keys))
    with np.errstate(divide="ignore"):
        return np.log(largest), scale * float(np.prod(list(norms)))


def assert_accurate(got: jax.Array, arguments: dict[str, Any], error: float) -> None:
    """Errors are at most `error` of the largest product of norms, plus a rounding floor."""
    truth, bound = scores_by_hand(**arguments)
    assert got.dtype == jnp.float32 and got.shape == truth.shape
    scores = array(got)
    np.testing.assert_array_equal(scores > -np.inf, truth > -np.inf)
    large, small = truth > -80, (truth > -np.inf) & (truth <= -80)  # the latter a backend may round upwards
    assert np.abs(scores[large] - truth[large]).max() <= error * bound + 4e-6
    assert (scores[small] < -80 + error * bound).all()


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]
    error: ClassVar[float] = 1e-6

    def run(self, **arguments: Any) -> jax.Array:
        return _compiled(**arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_errs_no_more_than_stated(self, case: Case):
        arguments = case.arguments(KEY)
        assert_accurate(self.run(**arguments), arguments, self.error)

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Query vectors that see nothing, in a row with others and alone, and key vectors that none sees, at both ends."""
        arguments = Case("padded", 1, 1, 64, 70, 70, 4, 4, batch=2).arguments(KEY)
        vector = np.arange(70)
        blind, hidden = np.stack([vector >= 49, vector < 5]), np.stack([vector >= 50, vector < 7])
        first = np.where(hidden[:, :1], [[0], [7]], 0)
        end = np.where(blind, 0, np.clip(vector + 1, 8, np.array([[50], [70]])))
        seen = np.stack([np.broadcast_to(first, end.shape), end], axis=-1)
        return arguments | {"seen": jnp.asarray(seen)}, {"queries": blind, "keys": hidden}

    def test_vectors_that_see_nothing_score_nothing(self):
        arguments = Case("blind", 2, 1, 64, 72, 72, 4, 4).arguments(KEY)
        arguments["seen"] = arguments["seen"].at[:, 4:8].set(0).at[:, 9, 1].set(-3)
        assert_accurate(self.run(**arguments), arguments, self.error)
        assert (self.run(**arguments)[0, :, 1] == -jnp.inf).all()

    def test_heads_of_any_magnitude(self):
        """Each head has its own magnitude; one is zero throughout."""
        arguments = Case("heads", 4, 4, 64, 17, 20, 1, 4).arguments(KEY)
        for name, sizes in (("queries", [1, 1e-30, 0, 1e14]), ("keys", [1, 1e-25, 1, 1e-13])):
            arguments[name] *= jnp.asarray(sizes, "float32")[None, None, :, None]
        got, (truth, _) = array(self.run(**arguments)), scores_by_hand(**arguments)
        np.testing.assert_array_equal(got > -np.inf, truth > -np.inf)
        for head, bound in enumerate((50.0, 0.0, 0.0, 500.0)):
            near = truth[:, head] > -80
            assert np.abs(got[:, head][near] - truth[:, head][near]).max() <= self.error * bound + 4e-6


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: its gradients, and transformations."""

    gradient_error: ClassVar[float] = 4e-6

    @pytest.mark.parametrize("join", ["sum", "max"])
    def test_gradients(self, join: str):
        arguments = Case("gradients", 4, 2, 64, 70, 100, 4, 4, join=join, offset=2).arguments(KEY)
        arguments["seen"] = arguments["seen"].at[:, 4:8].set(0).at[:, 40:, 0].set(17)
        compare_gradients(arguments, self.implementation, self.gradient_error)

    def test_runs_under_shard_map(self):
        """Each device has heads of its own."""
        arguments = Case("sharded", 4, 2, 64, 64, 64, 4, 4).arguments(KEY)
        arrays = {name: arguments.pop(name) for name in ("queries", "keys", "seen")}
        heads: dict[str, P] = dict.fromkeys(("queries", "keys"), P(None, None, "model"))
        run, rounding = functools.partial(self.run, **arguments), assert_within_rounding  # sums of XLA depend on shapes
        compare_with_sharded(run, arrays, heads, P(None, "model"), rounding)

    def test_reads_some_rows_of_more_keys(self):
        """As of a cache of several layers; the row is known or traced."""
        case = Case("rows", 2, 2, 64, 1, 128, 1, 8, batch=2, causal=False, dtype="bfloat16")
        arguments = case.arguments(KEY)
        keys = arguments["keys"]
        layers = jnp.concatenate([jnp.full_like(keys, jnp.nan), keys, jnp.full_like(keys, jnp.nan)])
        for row in (2, jnp.int32(2)):
            assert_accurate(self.run(**arguments | {"keys": layers, "first_row": row}), arguments, self.error)

    def test_maps(self):
        arguments = Case("mapped", 2, 2, 64, 64, 64, 2, 4, batch=3).arguments(KEY)
        seen, static = arguments["seen"], {name: x for name, x in arguments.items() if name in SETTINGS}

        def one(queries: jax.Array, keys: jax.Array) -> jax.Array:
            return self.run(queries=queries[None], keys=keys[None], seen=seen, **static)[0]

        assert_accurate(jax.vmap(one)(arguments["queries"], arguments["keys"]), arguments, self.error)


def compare_gradients(arguments: dict[str, Any], implementation: Implementation, error: float) -> None:
    """Gradients of a loss that reads every finite score are those of the definition."""
    arrays = {name: x for name, x in arguments.items() if name not in SETTINGS}
    static = {name: x for name, x in arguments.items() if name in SETTINGS}

    def gradients(name: Implementation) -> Any:
        def loss(queries: jax.Array, keys: jax.Array) -> jax.Array:
            scores = score_sub_blocks(queries, keys, seen=arrays["seen"], **static, implementation=name)
            weights = jnp.cos(jnp.arange(scores.size)).reshape(scores.shape)
            return (jnp.where(scores > -jnp.inf, scores, 0) * weights).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays["queries"], arrays["keys"])

    for got, truth in zip(gradients(implementation), gradients("reference"), strict=True):
        assert got.dtype == truth.dtype
        np.testing.assert_allclose(array(got), array(truth), rtol=0, atol=error * float(jnp.abs(truth).max()))

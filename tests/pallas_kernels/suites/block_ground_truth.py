"""Conformance suite of `attention_with_block_scores`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import AttentionWithScores, attention_with_block_scores
from pallas_kernels.backends import Implementation
from pallas_kernels.block_ground_truth import kernel
from pallas_kernels.block_ground_truth.api import STATISTICS
from pallas_kernels.block_ground_truth.cases import HALF, STATIC, TINY, Case
from pallas_kernels.cases import Heads
from tests.pallas_kernels.suites.comparison import (
    KEY,
    assert_as_good_as,
    assert_bitwise_equal,
    assert_within_rounding,
    compare_with_sharded,
    masked_attention,
    slow_but,
    softmax_weights,
)
from tests.pallas_kernels.suites.padding import IgnoresPadding, behind, fill, products_of_padding

_compiled = jax.jit(
    attention_with_block_scores,
    static_argnames=(*STATIC, "scale", "implementation"),
)


def named(name: str) -> Case:
    return next(case for case in TINY if case.name == name)


def visible(case: Case, arguments: dict[str, Any]) -> np.ndarray:
    """Mask [B, H, T, S] of the keys that each query sees."""
    lengths = np.asarray(case.lengths or (case.length,) * case.batch)
    ids = np.asarray(arguments.get("segment_ids", np.arange(case.length) < lengths[:, None]))
    same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]
    mask = same & np.tri(case.length, dtype=bool)
    return np.broadcast_to(mask[:, None], (case.batch, case.heads.heads, *mask.shape[1:]))


def scores_by_hand(weights: np.ndarray, b: int, kv_heads: int, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """Both kinds of scores from attention weights [B, H, T, T], block by block."""
    of_keys, of_heads = {"max": (np.max, np.max), "mass": (np.sum, np.mean)}[statistic]
    batch, heads, length, _ = weights.shape
    num_blocks = -(-length // b)
    blocks = [slice(i * b, (i + 1) * b) for i in range(num_blocks)]
    block_scores = np.zeros((batch, heads, num_blocks, num_blocks))
    token_scores = np.zeros((batch, kv_heads, length, num_blocks))
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads, length, length)
    for j, columns in enumerate(blocks):
        for i, rows in enumerate(blocks):
            block_scores[:, :, i, j] = of_keys(weights[:, :, rows, columns], 3).max(2)
        later = slice((j + 1) * b, length)
        token_scores[:, :, later, j] = of_heads(of_keys(grouped[:, :, :, later, columns], 4), 2)
    for scores in (block_scores, token_scores):
        scores /= np.maximum(scores.sum(-1, keepdims=True), 1e-300)
    return block_scores, token_scores


def assert_chunks_are_the_whole(run: Callable[..., Any], case: Case, chunks: tuple[int, ...]) -> None:
    """Results of chunks that start at the positions `chunks` equal those of the whole up to rounding."""
    arguments = case.arguments(KEY)
    whole, parts = run(**arguments), []
    for begin, end in itertools.pairwise((*chunks, case.length)):
        offset = {"q": arguments["q"][:, begin:end], "query_offset": jnp.int32(begin)}
        parts.append(run(**arguments | offset))
    for name, axis in (("output", 1), ("lse", 1), ("block_scores", 2), ("token_scores", 2)):
        joined = np.concatenate([np.asarray(getattr(part, name), np.float32) for part in parts], axis=axis)
        truth = np.asarray(getattr(whole, name), np.float32)
        if name == "output" and whole.output.dtype != jnp.float32:
            np.testing.assert_allclose(joined, truth, atol=2**-7, rtol=2**-7)  # tiles may begin elsewhere
        else:
            assert_within_rounding(joined, truth)


def compare_with_plain_attention(case: Case, run: Callable[..., Any]) -> None:
    """Errors of the output are at most twice those of plain attention; the rest is float32. Two runs are bitwise equal."""
    arguments = case.arguments(KEY)
    got = run(**arguments)
    exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
    truth = _compiled(**exact, implementation="reference")
    plain = masked_attention(arguments["q"], arguments["k"], arguments["v"], visible(case, arguments))
    assert_as_good_as(plain, got.output, truth.output)
    for name in ("lse", "block_scores", "token_scores"):
        if getattr(truth, name) is None:
            assert getattr(got, name) is None
        else:
            assert_within_rounding(getattr(got, name), getattr(truth, name))
    assert_bitwise_equal(got, run(**arguments))


def compare_where_the_maximum_comes_late(case: Case, run: Callable[..., Any]) -> None:
    """With a key that dominates the earlier ones, so that weights relative to a maximum that is not final would be wrong."""
    arguments = case.arguments(KEY)
    arguments["k"] = arguments["k"].at[:, 300].mul(8)
    exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
    truth: Any = _compiled(**exact, implementation="reference")
    got = run(**arguments)
    np.testing.assert_allclose(got.block_scores, truth.block_scores, rtol=2e-5)
    np.testing.assert_allclose(got.token_scores, truth.token_scores, rtol=2e-5)


def padded(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arguments = case.arguments(KEY)
    if "segment_ids" in arguments:
        keys = np.asarray(arguments["segment_ids"]) == 0
    else:
        keys = behind(arguments["lengths"], case.length)
    return arguments, dict.fromkeys(("q", "k", "v"), keys)


BY_HAND = [named(name) for name in ("two-tiles", "ragged", "packed", "ragged-by-mass", "packed-by-mass")]


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return padded(named("ragged"))

    @pytest.mark.parametrize("case", [named("packed"), named("packed-by-mass")], ids=lambda case: case.name)
    def test_padding_between_sequences_reaches_no_result(self, case: Case):
        arguments, padding = padded(case)
        clean, filled = (
            self.run(**arguments | {n: fill(arguments[n], mask, x) for n, mask in padding.items()})
            for x in ((0.0,), (np.nan, np.inf))
        )
        assert_bitwise_equal(clean, filled)

    def run(self, **arguments: Any) -> Any:
        """Results as AttentionWithScores."""
        return _compiled(**arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.name)
    def test_is_attention_and_its_weights_by_block(self, case: Case):
        arguments = case.arguments(KEY)
        mask = visible(case, arguments)
        weights, lse = softmax_weights(arguments["q"], arguments["k"], mask)
        block_scores, token_scores = scores_by_hand(weights, case.block_size, case.heads.kv_heads, case.statistic)
        got = self.run(**arguments)
        assert_within_rounding(got.output, masked_attention(arguments["q"], arguments["k"], arguments["v"], mask))
        assert_within_rounding(got.lse, lse.transpose(0, 2, 1))
        assert_within_rounding(got.block_scores, block_scores)
        assert_within_rounding(got.token_scores, token_scores)

    @pytest.mark.parametrize("case", [named("ragged"), named("ragged-by-mass")], ids=lambda case: case.name)
    def test_rows_of_scores_sum_to_one_or_nothing(self, case: Case):
        got = self.run(**case.arguments(KEY))
        lengths = np.asarray(case.lengths)[:, None, None]
        blocks = np.arange(got.block_scores.shape[2]) * case.block_size < lengths
        tokens = (np.arange(case.length) < lengths) & (np.arange(case.length) >= case.block_size)
        for scores, rows in ((got.block_scores, blocks), (got.token_scores, tokens)):
            np.testing.assert_allclose(scores.sum(-1), np.broadcast_to(rows, scores.shape[:3]), atol=1e-6)

    def test_packed_sequences_are_separate_ones(self):
        case = Case(
            "packed", Heads(4, 2, 64), 320, block_size=32, token_scores=True, segments=(100, 160), dtype="float32"
        )
        packed = case.arguments(KEY)
        got = self.run(**packed)
        for start, size in ((0, 100), (128, 160)):
            cut = {name: packed[name][:, start : start + size] for name in ("q", "k", "v")}
            alone = self.run(**packed | cut | {"segment_ids": None})
            tokens, blocks = slice(start, start + size), slice(start // 32, -(-(start + size) // 32))
            assert_within_rounding(got.output[:, tokens], alone.output)
            assert_within_rounding(got.lse[:, tokens], alone.lse)
            assert_within_rounding(got.block_scores[:, :, blocks, blocks], alone.block_scores)
            assert_within_rounding(got.token_scores[:, :, tokens, blocks], alone.token_scores)
            assert got.block_scores[:, :, blocks].sum() == pytest.approx(float(alone.block_scores.sum()), rel=1e-5)
            assert got.token_scores[:, :, tokens].sum() == pytest.approx(float(alone.token_scores.sum()), rel=1e-5)
        np.testing.assert_array_equal(got.output[:, 288:], 0)
        np.testing.assert_array_equal(got.block_scores[:, :, 9:], 0)

    def test_chunks_of_queries_are_the_whole(self):
        case = Case(
            "chunks", Heads(4, 2, 64), 420, block_size=32, token_scores=True, segments=(90, 250), dtype="float32"
        )
        assert_chunks_are_the_whole(self.run, case, (0, 64, 320))

    def test_keys_after_the_queries_have_no_influence(self):
        """Neither their values nor their number; their columns are 0."""
        arguments = Case("more", Heads(2, 1, 64), 200, block_size=32, token_scores=True, dtype="float32").arguments(KEY)
        got, alone = (
            self.run(**arguments | {n: arguments[n][:, :size] for n in names})
            for names, size in (("q", 64), ("qkv", 64))
        )
        np.testing.assert_array_equal(got.block_scores[..., 2:], 0)
        np.testing.assert_array_equal(got.token_scores[..., 2:], 0)
        assert_within_rounding(got.output, alone.output)
        assert_within_rounding(got.block_scores[..., :2], alone.block_scores)
        assert_within_rounding(got.token_scores[..., :2], alone.token_scores)

    def test_mass_of_equal_weights_is_a_count_of_keys(self):
        """Keys of equal weight: the mass of a block is the share of the keys that it has."""
        case = Case("equal", Heads(4, 2, 64), 96, block_size=32, token_scores=True, statistic="mass", dtype="float32")
        arguments = case.arguments(KEY)
        got = self.run(**arguments | {"k": jnp.ones_like(arguments["k"])})
        mass = np.array([[1, 0, 0], [32 / 33, 1 / 2, 0], [32 / 65, 32 / 65, 1 / 3]])  # of the query that has most
        truth = np.broadcast_to(mass / mass.sum(-1, keepdims=True), got.block_scores.shape)
        assert_within_rounding(got.block_scores, truth)
        completed = np.arange(3)[None] < np.arange(96)[:, None] // 32
        truth = np.broadcast_to(completed / np.maximum(completed.sum(-1, keepdims=True), 1), got.token_scores.shape)
        assert_within_rounding(got.token_scores, truth)

    def test_scores_are_computed_on_request(self):
        arguments = named("token-scores").arguments(KEY) | {"token_scores": False}
        got = self.run(**arguments)
        assert got.block_scores is None and got.token_scores is None


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: every dtype, and transformations."""

    # The others are compared with NumPy in every run.
    @pytest.mark.parametrize(
        "case",
        slow_but(TINY, *{case.name for case in TINY} - {case.name for case in BY_HAND}),
        ids=lambda case: case.name,
    )
    def test_errs_no_more_than_plain_attention(self, case: Case):
        compare_with_plain_attention(case, self.run)

    @pytest.mark.parametrize("statistic", STATISTICS)
    def test_scores_stay_exact_where_the_maximum_comes_late(self, statistic: str):
        case = Case("late", Heads(2, 1, 64), 512, token_scores=True, statistic=statistic, dtype="float32")
        compare_where_the_maximum_comes_late(case, self.run)

    def test_runs_under_shard_map(self):
        """Each device has key/value heads of its own, and the query heads that read them."""
        arguments = named("ragged").arguments(KEY)
        static = {name: arguments.pop(name) for name in STATIC}
        specs = dict.fromkeys("qkv", P(None, None, "model"))
        out_specs: list[Any] = [specs["q"], specs["q"], P(None, "model"), P(None, "model")]
        compare_with_sharded(functools.partial(self.run, **static), arguments, specs, AttentionWithScores(*out_specs))

    def test_maps_and_scans(self):
        """Under vmap over a batch of calls and inside a scan, the results are those of single calls."""
        case = Case("small", Heads(4, 2, 64), 40, block_size=16, dtype="float32")
        stacked = jax.vmap(lambda key: tuple(case.arguments(key)[name] for name in ("q", "k", "v")))(
            jax.random.split(KEY, 2)
        )
        call = functools.partial(attention_with_block_scores, block_size=16, implementation=self.implementation)
        mapped = jax.jit(jax.vmap(call))(*stacked)
        _, scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, qkv: (None, call(*qkv)), None, xs))(stacked)
        for i in range(2):
            single = self.run(**dict(zip("qkv", (x[i] for x in stacked), strict=True)), block_size=16)
            for x, y, z in zip(jax.tree.leaves(mapped), jax.tree.leaves(scanned), jax.tree.leaves(single), strict=True):
                assert_within_rounding(x[i], z)
                assert_within_rounding(y[i], z)

    def test_is_a_constant_for_gradients(self):
        """Gradients of other parameters ignore it, also in a scan with rematerialization."""
        arguments = Case("small", Heads(4, 2, 64), 40, block_size=16, dtype="float32").arguments(KEY)

        def loss(parameter):
            @jax.checkpoint
            def layer(total, _):
                target = attention_with_block_scores(**arguments, implementation=self.implementation).block_scores
                return total + (parameter * target).sum(), None

            return jax.lax.scan(layer, jnp.zeros(()), None, length=2)[0]

        gradient = jax.jit(jax.grad(loss))(jnp.ones(()))
        assert gradient == pytest.approx(2 * 4 * 3, rel=1e-5)  # two layers, four heads, three rows that sum to 1


QUICK = slow_but(HALF, "half-ragged", "half-packed-by-mass")


class HalfPrecision(IgnoresPadding):
    """Properties of backends for GPUs, which take bfloat16 and float16, and blocks of 64 and 128 tokens."""

    implementation: ClassVar[Implementation]

    statistic: str = "max"

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        scores: dict[str, Any] = dict(token_scores=True, statistic=self.statistic)
        return padded(Case("padded", Heads(2, 1, 64), 192, batch=2, lengths=(192, 70), **scores))

    @pytest.mark.slow
    @products_of_padding
    def test_padding_reaches_no_result_by_mass(self):
        self.statistic = "mass"
        self.test_padding_reaches_no_result()

    def run(self, **arguments: Any) -> Any:
        return _compiled(**arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
    def test_errs_no_more_than_plain_attention(self, case: Case):
        compare_with_plain_attention(case, self.run)

    @pytest.mark.parametrize("statistic", STATISTICS)
    def test_scores_stay_exact_where_the_maximum_comes_late(self, statistic: str):
        case = Case("late", Heads(2, 1, 64), 320, token_scores=True, statistic=statistic)
        compare_where_the_maximum_comes_late(case, self.run)

    def test_rows_may_be_longer_than_the_shared_memory_holds(self, monkeypatch: pytest.MonkeyPatch):
        """Of a length of its own: what is compiled for others has whole rows."""
        monkeypatch.setattr(kernel, "ROW_BLOCKS", 2)
        compare_with_plain_attention(Case("long-rows", Heads(2, 1, 64), 264), self.run)

    @pytest.mark.slow
    def test_chunks_of_queries_are_the_whole(self):
        case = Case("chunks", Heads(2, 1, 64), 420, token_scores=True, segments=(90, 250))
        assert_chunks_are_the_whole(self.run, case, (0, 64, 320))

    @pytest.mark.parametrize("statistic", STATISTICS)
    def test_keys_after_the_queries_are_not_seen(self, statistic: str):
        """Nor is memory beyond the keys, which TMA may read."""
        arguments = Case("more", Heads(2, 1, 64), 200, token_scores=True, statistic=statistic).arguments(KEY)
        arguments["q"] = arguments["q"][:, :72]
        poisoned = {name: arguments[name].at[:, 128:].set(jnp.nan) for name in ("k", "v")}
        got, truth = self.run(**arguments | poisoned), self.run(**arguments)
        assert_bitwise_equal(got, truth)
        np.testing.assert_array_equal(got.block_scores[..., 2:], 0)
        assert np.isfinite(np.asarray(got.output, np.float32)).all()

    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_any_scale(self, scale: float):
        arguments: dict[str, Any] = Case("scale", Heads(2, 1, 64), 128).arguments(KEY) | {"scale": scale}
        exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
        got, truth = self.run(**arguments), _compiled(**exact, implementation="reference")
        assert_within_rounding(got.lse, truth.lse)
        assert_within_rounding(got.block_scores, truth.block_scores)
        np.testing.assert_allclose(np.asarray(got.output, np.float32), truth.output, rtol=2**-7, atol=2**-7)

    def test_maps(self):
        """Under vmap over a batch of calls the results are those of single calls."""
        calls = [Case("small", Heads(2, 1, 64), 128).arguments(key) for key in jax.random.split(KEY, 2)]
        stacked = [jnp.stack([call[name] for call in calls]) for name in ("q", "k", "v")]
        mapped = jax.jit(jax.vmap(functools.partial(attention_with_block_scores, implementation=self.implementation)))
        results = mapped(*stacked)
        for i, arguments in enumerate(calls):
            single = self.run(**arguments)
            for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(single), strict=True):
                assert_bitwise_equal(x[i], y)

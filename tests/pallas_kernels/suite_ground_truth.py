"""What every implementation of `attention_with_block_scores` must do."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_with_block_scores
from pallas_kernels.backends import Implementation
from pallas_kernels.block_ground_truth.cases import TINY, Case
from pallas_kernels.shapes import Heads
from tests.pallas_kernels.comparison import (
    KEY,
    assert_as_good_as,
    assert_bitwise_equal,
    assert_within_rounding,
    masked_attention,
    softmax_weights,
)

_compiled = jax.jit(
    attention_with_block_scores,
    static_argnames=("block_size", "scale", "block_scores", "token_scores", "implementation"),
)


def named(name: str) -> Case:
    return next(case for case in TINY if case.name == name)


def visible(case: Case, arguments: dict[str, Any]) -> np.ndarray:
    """[B, H, T, S]: which keys each query sees."""
    lengths = np.asarray(case.lengths or (case.length,) * case.batch)
    ids = np.asarray(arguments.get("segment_ids", np.arange(case.length) < lengths[:, None]))
    same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]
    mask = same & np.tri(case.length, dtype=bool)
    return np.broadcast_to(mask[:, None], (case.batch, case.heads.heads, *mask.shape[1:]))


def scores_by_hand(weights: np.ndarray, b: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Both scores, one entry at a time, from attention weights [B, H, T, T]."""
    batch, heads, length, _ = weights.shape
    num_blocks = -(-length // b)
    blocks = [slice(i * b, (i + 1) * b) for i in range(num_blocks)]
    block_scores = np.zeros((batch, heads, num_blocks, num_blocks))
    token_scores = np.zeros((batch, kv_heads, length, num_blocks))
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads, length, length)
    for j, columns in enumerate(blocks):
        for i, rows in enumerate(blocks):
            block_scores[:, :, i, j] = weights[:, :, rows, columns].max((2, 3))
        later = slice((j + 1) * b, length)
        token_scores[:, :, later, j] = grouped[:, :, :, later, columns].max((2, 4))
    for scores in (block_scores, token_scores):
        scores /= np.maximum(scores.sum(-1, keepdims=True), 1e-300)
    return block_scores, token_scores


class Definition:
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def run(self, **arguments: Any) -> Any:
        """An AttentionWithScores with what the arguments ask for."""
        return _compiled(**arguments, implementation=self.implementation)

    @pytest.mark.parametrize("case", [named("two-tiles"), named("ragged"), named("packed")], ids=lambda case: case.name)
    def test_is_attention_and_its_largest_weights(self, case: Case):
        arguments = case.arguments(KEY)
        mask = visible(case, arguments)
        weights, lse = softmax_weights(arguments["q"], arguments["k"], mask)
        block_scores, token_scores = scores_by_hand(weights, case.block_size, case.heads.kv_heads)
        got = self.run(**arguments)
        assert_within_rounding(got.output, masked_attention(arguments["q"], arguments["k"], arguments["v"], mask))
        assert_within_rounding(got.lse, lse.transpose(0, 2, 1))
        assert_within_rounding(got.block_scores, block_scores)
        assert_within_rounding(got.token_scores, token_scores)

    def test_rows_of_scores_sum_to_one_or_nothing(self):
        case = named("ragged")
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

    @pytest.mark.parametrize("case", [named("ragged"), named("packed")], ids=lambda case: case.name)
    def test_some_queries_get_their_rows_of_the_whole(self, case: Case):
        arguments = case.arguments(KEY)
        whole, b = self.run(**arguments), case.block_size
        for start, size in ((0, 3 * b), (2 * b, 5 * b), (7 * b, case.length - 7 * b)):
            queries = {"q": arguments["q"][:, start : start + size], "query_offset": jnp.int32(start)}
            got = self.run(**arguments | queries)
            tokens, blocks = slice(start, start + size), slice(start // b, -(-(start + size) // b))
            assert_within_rounding(got.output, whole.output[:, tokens])
            assert_within_rounding(got.lse, whole.lse[:, tokens])
            assert_within_rounding(got.block_scores, whole.block_scores[:, :, blocks])
            assert_within_rounding(got.token_scores, whole.token_scores[:, :, tokens])

    def test_scores_are_made_when_asked_for(self):
        arguments = named("token-scores").arguments(KEY) | {"token_scores": False}
        got = self.run(**arguments)
        assert got.block_scores is None and got.token_scores is None


class Conformance(Definition):
    """What a backend must do besides: agree with the definition, in every dtype, however it is called."""

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_errs_no_more_than_plain_attention(self, case: Case):
        arguments = case.arguments(KEY)
        got = self.run(**arguments)
        exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
        truth = _compiled(**exact, implementation="reference")
        plain = masked_attention(arguments["q"], arguments["k"], arguments["v"], visible(case, arguments))
        assert_as_good_as(plain, got.output, truth.output)
        for name in ("lse", "block_scores", "token_scores"):
            if getattr(truth, name) is None:
                assert getattr(got, name) is None
            else:
                assert_within_rounding(getattr(got, name), getattr(truth, name))
        assert_bitwise_equal(got, self.run(**arguments))

    def test_scores_stay_exact_where_the_maximum_comes_late(self):
        """A key that dwarfs the earlier ones: weights relative to a maximum that was not final would be wrong."""
        case = Case("late", Heads(2, 1, 64), 512, token_scores=True, dtype="float32")
        arguments = case.arguments(KEY)
        arguments["k"] = arguments["k"].at[:, 300].mul(8)
        truth: Any = _compiled(**arguments, implementation="reference")
        got = self.run(**arguments)
        np.testing.assert_allclose(got.block_scores, truth.block_scores, rtol=2e-5)
        np.testing.assert_allclose(got.token_scores, truth.token_scores, rtol=2e-5)

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

    def test_is_a_constant_to_what_is_trained(self):
        """Gradients of something else pass by it, also inside a scan with rematerialisation."""
        arguments = Case("small", Heads(4, 2, 64), 40, block_size=16, dtype="float32").arguments(KEY)

        def loss(parameter):
            @jax.checkpoint
            def layer(total, _):
                target = attention_with_block_scores(**arguments, implementation=self.implementation).block_scores
                return total + (parameter * target).sum(), None

            return jax.lax.scan(layer, jnp.zeros(()), None, length=2)[0]

        gradient = jax.jit(jax.grad(loss))(jnp.ones(()))
        assert gradient == pytest.approx(2 * 4 * 3, rel=1e-5)  # two layers, four heads, three rows that sum to 1

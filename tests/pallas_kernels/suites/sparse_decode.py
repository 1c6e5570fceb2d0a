"""Conformance suite of `sparse_decode_attention`."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockIndices, sparse_decode_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.cases import Heads
from pallas_kernels.sparse_decode.cases import HALF, TINY, Case
from tests.pallas_kernels.suites.comparison import (
    KEY,
    assert_as_good_as,
    assert_bitwise_equal,
    assert_within_rounding,
    compare_with_sharded,
    listed_tokens,
    masked_attention,
    slow_but,
    softmax_weights,
    with_fillers,
)
from tests.pallas_kernels.suites.padding import IgnoresPadding, behind, fill, products_of_padding

Run = Callable[..., tuple[jax.Array, jax.Array]]


def named(name: str) -> Case:
    return next(case for case in TINY if case.name == name)


@functools.cache
def compiled(implementation: Implementation) -> Run:
    call = functools.partial(sparse_decode_attention, return_lse=True, implementation=implementation)
    return jax.jit(call, static_argnames="scale")


def decode_mask(arguments: dict[str, Any]) -> np.ndarray:
    """Mask [B, H, 1, S] of the keys that each head sees."""
    (_, num_keys, kv_heads, _), (batch, heads, _) = arguments["k"].shape, arguments["q"].shape
    inside = np.arange(num_keys) < np.asarray(arguments["lengths"])[:, None]
    mask = np.broadcast_to(inside[:, None], (batch, heads, num_keys))
    if arguments["blocks"] is not None:
        mask = mask & listed_tokens(arguments["blocks"], num_keys).repeat(heads // kv_heads, axis=1)
    return mask[:, :, None]


def compare_with_plain_attention(arguments: dict[str, Any], run: Run) -> None:
    """Errors are at most twice those of plain attention under the lists' mask; two runs are bitwise equal."""
    out, lse = run(**arguments)
    exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
    truth, true_lse = compiled("reference")(**exact)
    q, k, v = arguments["q"][:, None], arguments["k"], arguments["v"]
    assert_as_good_as(masked_attention(q, k, v, decode_mask(arguments))[:, 0], out, truth)
    assert_within_rounding(lse, true_lse)
    assert_bitwise_equal((out, lse), run(**arguments))


def compare_with_poisoned(arguments: dict[str, Any], run: Run) -> None:
    """Neither fillers nor the keys of unlisted blocks are read."""
    blocks = arguments["blocks"]
    unlisted = 1
    listed = blocks.to_mask(blocks.width).at[..., unlisted].set(False)
    arguments = arguments | {"blocks": BlockIndices.from_mask(listed, block_size=blocks.block_size)}
    clean = run(**arguments)
    tokens = jnp.arange(arguments["k"].shape[1]) // blocks.block_size == unlisted
    for name in ("k", "v"):
        arguments[name] = jnp.where(tokens[None, :, None, None], jnp.nan, arguments[name])
    for filler in (unlisted, -(2**31), 2**31 - 1):
        assert_bitwise_equal(clean, run(**arguments | {"blocks": with_fillers(arguments["blocks"], filler)}))


def compare_gradients(case: Case, implementation: Implementation) -> None:
    """Of output and lse, in q, k and v: those of the definition in float32, within the rounding of the arguments' dtype."""
    arguments = case.arguments(KEY)
    qkv = {name: arguments.pop(name) for name in ("q", "k", "v")}

    def loss(qkv: dict[str, jax.Array], implementation: Implementation) -> jax.Array:
        call = functools.partial(sparse_decode_attention, return_lse=True, implementation=implementation)
        out, lse = call(**qkv, **arguments)
        return (out.astype("float32") ** 2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    def gradients(qkv: dict[str, jax.Array], implementation: Implementation) -> dict[str, jax.Array]:
        return jax.jit(jax.grad(functools.partial(loss, implementation=implementation)))(qkv)

    dtype = qkv["q"].dtype
    got = gradients(qkv, implementation)
    truth = gradients(jax.tree.map(lambda x: x.astype("float32"), qkv), "reference")
    tolerance = (64 if dtype == "float32" else 16) * float(jnp.finfo(dtype).eps)
    for name in qkv:
        x, y = (np.asarray(of[name], np.float64) for of in (got, truth))
        assert np.abs(x - y).max() <= tolerance * max(1, np.abs(y).max())


def compare_with_own_rows(arguments: dict[str, Any], run: Run) -> None:
    """As a layer reads its rows of the caches of all layers, in any order."""
    alone = run(**arguments)
    batch = len(arguments["q"])
    rows = jnp.arange(batch)[::-1] + 1
    for name in ("k", "v"):
        own = arguments[name]
        arguments[name] = jnp.full((batch + 2, *own.shape[1:]), jnp.nan, own.dtype).at[rows].set(own)
    assert_bitwise_equal(alone, run(**arguments, cache_rows=rows))


def compare_with_nothing(run: Run, *, heads: Heads, dtype: str) -> None:
    """With an empty list, a sequence of length 0, and a list beyond the sequence."""
    arguments = Case("empty", heads, 48, batch=3, block_size=16, dtype=dtype).arguments(KEY)
    counts = jnp.asarray([[0, 1], [1, 1], [1, 1]], jnp.int32)
    indices = jnp.asarray([[0, 0], [0, 0], [2, 1]], jnp.int32)[..., None]
    arguments |= {"blocks": BlockIndices(counts, indices, 16), "lengths": jnp.asarray([48, 0, 20])}
    out, lse = run(**arguments)
    seen = np.asarray([[False, True], [False, False], [False, True]]).repeat(2, axis=1)
    np.testing.assert_array_equal(lse > -jnp.inf, seen)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[np.logical_not(seen)], 0)
    assert np.isfinite(np.asarray(out, np.float32)).all() and not np.isnan(lse).any()


def padded(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arguments = case.arguments(KEY)
    keys = behind(arguments["lengths"], arguments["k"].shape[1])
    return arguments, {"q": np.asarray(arguments["lengths"]) == 0, "k": keys, "v": keys}


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return padded(named("ragged"))

    def run(self, **arguments: Any) -> tuple[jax.Array, jax.Array]:
        return compiled(self.implementation)(**arguments)

    @pytest.mark.parametrize("case", [named("group-of-4"), named("ragged")], ids=lambda case: case.name)
    def test_is_attention_under_the_mask_of_the_lists(self, case: Case):
        arguments = case.arguments(KEY)
        mask = decode_mask(arguments)
        out, lse = self.run(**arguments)
        q = arguments["q"][:, None]
        assert_within_rounding(out, masked_attention(q, arguments["k"], arguments["v"], mask)[:, 0])
        assert_within_rounding(lse, softmax_weights(q, arguments["k"], mask)[1][..., 0])

    @pytest.mark.parametrize("listed", [True, False])
    def test_all_blocks_are_dense_attention(self, listed: bool):
        """With lists of all blocks, and without lists."""
        arguments = Case("dense", Heads(4, 2, 64), 150, batch=2, density=1.0, dtype="float32").arguments(KEY)
        lengths = arguments["lengths"] = jnp.asarray([150, 31])
        if not listed:
            arguments["blocks"] = None
        out, _ = self.run(**arguments, scale=0.3)
        dense = jax.nn.dot_product_attention(
            arguments["q"][:, None], arguments["k"], arguments["v"], key_value_seq_lengths=lengths, scale=0.3
        )
        assert_within_rounding(out, dense[:, 0])

    def test_reads_its_own_rows_of_a_larger_cache(self):
        compare_with_own_rows(named("ragged").arguments(KEY), self.run)

    def test_heads_that_see_no_key_have_output_zero(self):
        compare_with_nothing(self.run, heads=Heads(4, 2, 64), dtype="float32")


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: every dtype, and transformations."""

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_errs_no_more_than_plain_attention(self, case: Case):
        compare_with_plain_attention(case.arguments(KEY), self.run)

    def test_fillers_and_unlisted_blocks_are_not_read(self):
        compare_with_poisoned(named("no-groups").arguments(KEY), self.run)

    def test_gradients(self):
        compare_gradients(named("ragged"), self.implementation)

    def test_runs_under_shard_map(self):
        """Each device has key/value heads of its own, the query heads that read them, and their lists."""
        keys = P(None, None, "model")
        specs = {"q": P(None, "model"), "k": keys, "v": keys, "blocks": P(None, "model")}
        compare_with_sharded(self.run, named("ragged").arguments(KEY), specs, P(None, "model"))

    def test_scans_over_a_growing_sequence(self):
        """Each step of a decoder's loop equals a single call."""
        arguments = Case("growing", Heads(4, 2, 64), 64, density=1.0, block_size=16, dtype="float32").arguments(KEY)
        lengths = jnp.asarray([[15], [16], [17], [64]])
        scanned = _scan(self.implementation, arguments, lengths)
        for i, length in enumerate(lengths):
            for together, alone in zip(scanned, self.run(**arguments | {"lengths": length}), strict=True):
                assert_within_rounding(together[i], alone)


QUICK = slow_but(HALF, "half-group-of-12", "half-ragged")


class HalfPrecision(IgnoresPadding):
    """Properties of backends for GPUs, which take bfloat16 and float16, and caches of a multiple of 8 tokens."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return padded(HALF[3])

    @products_of_padding
    def test_padding_reaches_no_result_of_dense_attention(self):
        arguments, padding = padded(HALF[3])
        clean, filled = (
            self.run(**arguments | {n: fill(arguments[n], m, x) for n, m in padding.items()} | {"blocks": None})
            for x in ((0.0,), (np.nan, np.inf))
        )
        assert_bitwise_equal(clean, filled)

    def run(self, **arguments: Any) -> tuple[jax.Array, jax.Array]:
        return compiled(self.implementation)(**arguments)

    @pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
    def test_errs_no_more_than_plain_attention(self, case: Case):
        compare_with_plain_attention(case.arguments(KEY), self.run)

    @pytest.mark.parametrize("case", [HALF[0], HALF[3]], ids=lambda case: case.name)
    def test_without_lists_errs_no_more_than_plain_attention(self, case: Case):
        compare_with_plain_attention(case.arguments(KEY) | {"blocks": None}, self.run)

    def test_fillers_and_unlisted_blocks_are_not_read(self):
        compare_with_poisoned(Case("few", Heads(4, 2, 64), 256, density=0.5).arguments(KEY), self.run)

    def test_pieces_beyond_the_list_are_not_read(self):
        compare_with_poisoned(Case("few", Heads(4, 2, 64), 96, density=0.9, block_size=16).arguments(KEY), self.run)

    def test_reads_its_own_rows_of_a_larger_cache(self):
        compare_with_own_rows(HALF[3].arguments(KEY), self.run)

    def test_heads_that_see_no_key_have_output_zero(self):
        compare_with_nothing(self.run, heads=Heads(4, 2, 64), dtype="bfloat16")

    def test_gradients(self):
        compare_gradients(Case("gradients", Heads(2, 1, 64), 128, batch=2, lengths=(128, 70)), self.implementation)

    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_any_scale(self, scale: float):
        arguments: dict[str, Any] = Case("scale", Heads(2, 1, 64), 128).arguments(KEY) | {"scale": scale}
        exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
        (out, lse), (truth, true_lse) = self.run(**arguments), compiled("reference")(**exact)
        assert_within_rounding(lse, true_lse)
        np.testing.assert_allclose(np.asarray(out, np.float32), truth, rtol=2**-7, atol=2**-7)

    def test_scans_over_a_growing_sequence(self):
        arguments = Case("growing", Heads(4, 2, 64), 64, density=1.0, block_size=16).arguments(KEY)
        lengths = jnp.asarray([[15], [16], [64]])
        scanned = _scan(self.implementation, arguments, lengths)
        for i, length in enumerate(lengths):
            assert_bitwise_equal([x[i] for x in scanned], self.run(**arguments | {"lengths": length}))


def _scan(implementation: Implementation, arguments: dict[str, Any], lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    call = functools.partial(sparse_decode_attention, return_lse=True, implementation=implementation)

    def step(_, lengths):
        return None, call(**arguments | {"lengths": lengths})

    return jax.jit(lambda lengths: jax.lax.scan(step, None, lengths)[1])(lengths)

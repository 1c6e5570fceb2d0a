"""Conformance suite of `block_sparse_attention`."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockIndices, block_sparse_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.block_sparse_attention.cases import HALF, SKIPPING, SKIPPING_HALF, TINY, Case
from pallas_kernels.cases import Heads, random_arrays
from tests.pallas_kernels.suites.comparison import (
    KEY,
    array,
    assert_as_good_as,
    assert_bitwise_equal,
    assert_within_rounding,
    compare_with_sharded,
    masked_attention,
    masked_lse,
    prefill_mask,
    slow_but,
    softmax_weights,
    with_fillers,
)
from tests.pallas_kernels.suites.padding import IgnoresPadding, behind, fill, products_of_padding


def named(name: str) -> Case:
    return next(case for case in TINY if case.name == name)


@functools.cache
def compiled(implementation: Implementation) -> Callable[..., tuple[jax.Array, jax.Array]]:
    call = functools.partial(block_sparse_attention, return_lse=True, implementation=implementation)
    return jax.jit(call, static_argnames=("scale", "density", "return_kept"))


def compare_with_plain_attention(arguments: dict[str, Any], run: Callable[[], tuple[jax.Array, jax.Array]]) -> None:
    """Errors are at most twice those of plain attention in the same precision; two runs are bitwise equal."""
    out, lse = run()
    exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
    truth, true_lse = compiled("reference")(**exact)
    plain = masked_attention(arguments["q"], arguments["k"], arguments["v"], prefill_mask(arguments))
    assert_as_good_as(plain, out, truth)
    assert_within_rounding(lse, true_lse)
    assert_bitwise_equal((out, lse), run())


def compare_with_poisoned(arguments: dict[str, Any], run: Callable[..., tuple[jax.Array, jax.Array]]) -> None:
    """Results do not change if a block on no list is NaN, and fillers are its number or not a block number."""
    blocks = arguments["blocks"]
    unlisted = 1
    listed = blocks.to_mask(blocks.width).at[..., unlisted].set(False)
    arguments["blocks"] = BlockIndices.from_mask(listed, block_size=blocks.block_size)
    clean = run(**arguments)
    tokens = jnp.arange(arguments["k"].shape[1]) // blocks.block_size == unlisted
    for name in ("k", "v"):
        arguments[name] = jnp.where(tokens[None, :, None, None], jnp.nan, arguments[name])
    for filler in (unlisted, -(2**31), 2**31 - 1):
        poisoned = run(**arguments | {"blocks": with_fillers(arguments["blocks"], filler)})
        assert_bitwise_equal(clean, poisoned)


def without_skipped(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition of `skip_threshold`, block by block in float64.

    Returns:
      (mask [B, H, T, S] of the keys that each query sees in the blocks that its tile does not skip, blocks that were not skipped
      [B, H, tiles], blocks that were [B, H, tiles]).
    """
    q, k, mask, b = (
        array(arguments["q"]),
        array(arguments["k"]),
        prefill_mask(arguments),
        arguments["blocks"].block_size,
    )
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.where(mask, np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    thresholds = np.broadcast_to(array(arguments["skip_threshold"]), q.shape[2])
    tile, left = min(b, 64), mask.copy()
    counts = np.zeros((2, *mask.shape[:2], -(-mask.shape[2] // tile)), int)
    for i, h, row in np.ndindex(counts.shape[1:]):
        queries = slice(row * tile, (row + 1) * tile)
        maximum = np.full(scores[i, h, queries].shape[0], -np.inf)
        for start in range(0, mask.shape[3], b):
            block = scores[i, h, queries, start : start + b]
            largest, seen = block.max(1), mask[i, h, queries, start : start + b].any(1)
            if not seen.any():
                continue
            larger = np.maximum(maximum, largest)[seen]
            skipped = (np.exp(largest[seen] - larger) < thresholds[h]).all()
            counts[int(skipped), i, h, row] += 1
            if skipped:
                left[i, h, queries, start : start + b] = False
            maximum = np.maximum(maximum, largest)
    return left, counts[0], counts[1]


def attention64(arguments: dict[str, Any], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of attention under a mask, in float64."""
    weights, lse = softmax_weights(arguments["q"], arguments["k"], mask)
    v = np.repeat(array(arguments["v"]), weights.shape[1] // arguments["v"].shape[2], axis=2)
    return np.einsum("bhts,bshd->bthd", weights, v), lse.transpose(0, 2, 1)


def compare_with_skipped(case: Case, run: Callable[..., tuple[jax.Array, ...]]) -> None:
    """The result is attention without the skipped blocks, of which there are many, and as near to attention with them as api.py says."""
    arguments = case.arguments(KEY)
    mask, kept, skipped = without_skipped(arguments)
    assert skipped.sum() > 0.1 * kept.sum() > 0
    out, lse, counts = run(**arguments, return_kept=True)
    np.testing.assert_array_equal(counts, kept)
    truth, true_lse = attention64(arguments, mask)
    assert_as_good_as(masked_attention(arguments["q"], arguments["k"], arguments["v"], mask), out, truth)
    assert_within_rounding(lse, true_lse)

    whole, whole_lse = attention64(arguments, prefill_mask(arguments))
    b, num_queries = arguments["blocks"].block_size, truth.shape[1]
    lost = skipped * np.broadcast_to(array(arguments["skip_threshold"]), truth.shape[2])[:, None] * b
    lost = lost.repeat(min(b, 64), axis=-1)[..., :num_queries].transpose(0, 2, 1)
    seen = whole_lse > -np.inf
    assert (whole_lse[seen] <= true_lse[seen] + np.log1p(lost)[seen]).all()
    assert (np.abs(whole - truth).max(-1) <= 2 * lost * np.abs(array(arguments["v"])).max() + 1e-12).all()


def compare_padded_skipping(case: Case, run: Callable[..., tuple[jax.Array, ...]]) -> None:
    arguments, padding = padded(case)
    clean, filled = (
        run(**arguments | {n: fill(arguments[n], mask, values) for n, mask in padding.items()}, return_kept=True)
        for values in ((0.0,), (np.nan, np.inf))
    )
    assert_bitwise_equal(clean, filled)


def compare_with_own_rows(case: Case, run: Callable[..., tuple[jax.Array, ...]]) -> None:
    """As a layer reads its rows of the caches of all layers, in any order."""
    arguments = case.arguments(KEY)
    alone = run(**arguments)
    batch = len(arguments["q"])
    rows = jnp.arange(batch)[::-1] + 1
    for name in ("k", "v"):
        own = arguments[name]
        arguments[name] = jnp.full((batch + 2, *own.shape[1:]), jnp.nan, own.dtype).at[rows].set(own)
    assert_bitwise_equal(alone, run(**arguments, cache_rows=rows))


# Each device has key/value heads of its own, the query heads that read them, and their lists.
HEADS = {
    "q": P(None, None, "model"),
    "k": P(None, None, "model"),
    "v": P(None, None, "model"),
    "blocks": P(None, "model"),
}


def gradients_of(
    arguments: dict[str, Any], implementation: Implementation, weights: Any, lse_weights: Any
) -> Callable[..., dict[str, jax.Array]]:
    """Gradients of a weighted sum of output and lse in the arrays {q, k, v} that the result takes."""

    def loss(qkv: dict[str, jax.Array]) -> jax.Array:
        changed: dict[str, Any] = arguments | qkv
        out, lse = block_sparse_attention(**changed, return_lse=True, implementation=implementation)
        return (out * weights).astype("float32").sum() + jnp.where(lse > -jnp.inf, lse * lse_weights, 0).sum()

    return jax.jit(jax.grad(loss))


def compare_gradients(case: Case, implementation: Implementation) -> None:
    """Errors of gradients are at most twice those of plain attention in the same precision; two runs are bitwise equal."""
    arguments = case.arguments(KEY)
    qkv = {name: arguments[name] for name in ("q", "k", "v")}
    mask = prefill_mask(arguments)
    weights, lse_weights = arguments["q"], arguments["q"].astype("float32").sum(-1)

    def plain_loss(qkv: dict[str, jax.Array]) -> jax.Array:
        out, lse = masked_attention(**qkv, mask=mask), masked_lse(qkv["q"], qkv["k"], mask)
        return (out * weights).astype("float32").sum() + (lse * lse_weights).sum()

    run = gradients_of(arguments, implementation, weights, lse_weights)
    got, plain = run(qkv), jax.jit(jax.grad(plain_loss))(qkv)
    exact = gradients_of(arguments, "reference", weights.astype("float32"), lse_weights)
    truth = exact(jax.tree.map(lambda x: x.astype("float32"), qkv))
    for name in qkv:
        assert_as_good_as(plain[name], got[name], truth[name])
    assert_bitwise_equal(got, run(qkv))


def compare_empty_gradients(arguments: dict[str, Any], implementation: Implementation) -> None:
    """Gradients are 0 for queries with an empty list and for keys on no list; what these keys and the fillers of lists hold has no
    part in any gradient."""
    blocks, b = arguments["blocks"], arguments["blocks"].block_size
    listed = blocks.to_mask(blocks.width).at[:, :, 2].set(False).at[..., 1].set(False)
    blocks = BlockIndices.from_mask(listed, block_size=b)
    qkv = {name: arguments.pop(name) for name in ("q", "k", "v")}
    arguments.pop("blocks")
    run = jax.jit(
        lambda qkv, blocks: gradients_of(
            arguments | {"blocks": blocks}, implementation, qkv["q"], jnp.ones(qkv["q"].shape[:3])
        )(qkv)
    )
    clean = jax.tree.map(np.asarray, run(qkv, blocks))
    for name, i in (("q", 2), ("k", 1), ("v", 1)):
        assert (clean[name][:, i * b : (i + 1) * b] == 0).all() and (clean[name][:, :b] != 0).any()
    tokens = (jnp.arange(qkv["k"].shape[1]) // b == 1)[None, :, None, None]
    poisoned = qkv | {name: jnp.where(tokens, jnp.nan, qkv[name]) for name in ("k", "v")}
    for filler in (1, -(2**31), 2**31 - 1):
        assert_bitwise_equal(clean, run(poisoned, with_fillers(blocks, filler)))


def compare_padded_gradients(case: Case, implementation: Implementation) -> None:
    """Bit by bit, gradients are those of zeros in the place of padding, whatever it and its cotangent hold."""
    arguments, padding = padded(case)
    qkv = {name: arguments.pop(name) for name in ("q", "k", "v")}

    @jax.jit
    def pull_back(qkv: dict[str, jax.Array], d_out: jax.Array) -> Any:
        def call(qkv: dict[str, jax.Array]) -> Any:
            return block_sparse_attention(**qkv, **arguments, return_lse=True, implementation=implementation)

        (_, lse), pull = jax.vjp(call, qkv)
        return pull((d_out, jnp.zeros_like(lse)))

    def gradients(*values: float) -> Any:
        filled = {name: fill(x, padding[name], values) for name, x in qkv.items()}
        return pull_back(filled, fill(jnp.ones_like(qkv["q"]), padding["q"], values))

    clean = gradients(0.0)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(clean))
    assert_bitwise_equal(clean, gradients(np.nan, np.inf))


def padded(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arguments = case.arguments(KEY)
    lengths, offset = arguments["lengths"], arguments["query_offset"]
    queries, keys = (behind(lengths, arguments[name].shape[1], at) for name, at in (("q", offset), ("k", 0)))
    return arguments, {"q": queries, "k": keys, "v": keys}


class Definition(IgnoresPadding):
    """Properties that the definition and every backend share."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return padded(named("ragged"))

    def run(self, **arguments: Any) -> tuple[jax.Array, jax.Array]:
        return compiled(self.implementation)(**arguments)

    @pytest.mark.parametrize(
        "case", [named("own-lists"), named("group-lists"), named("ragged")], ids=lambda case: case.name
    )
    def test_is_attention_under_the_mask_of_the_lists(self, case: Case):
        arguments = case.arguments(KEY)
        mask = prefill_mask(arguments)
        out, lse = self.run(**arguments)
        assert_within_rounding(out, masked_attention(arguments["q"], arguments["k"], arguments["v"], mask))
        assert_within_rounding(lse, softmax_weights(arguments["q"], arguments["k"], mask)[1].transpose(0, 2, 1))

    @pytest.mark.parametrize(("heads", "length", "b"), [(Heads(8, 1, 64), 200, 64), (Heads(2, 2, 128), 97, 16)])
    def test_all_blocks_are_dense_attention(self, heads: Heads, length: int, b: int):
        shape = 2, length, heads.kv_heads, heads.head_dim
        x = random_arrays(KEY, "float32", q=(2, length, heads.heads, heads.head_dim), k=shape, v=shape)
        out, _ = self.run(**x, blocks=BlockIndices.all_causal(length, length, block_size=b, batch=2), scale=0.3)
        dense = jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, scale=0.3)
        assert_within_rounding(out, dense)

    @pytest.mark.parametrize("case", SKIPPING, ids=lambda case: case.name)
    def test_skips_what_the_definition_skips(self, case: Case):
        compare_with_skipped(case, self.run)

    def test_reads_rows_of_a_cache(self):
        compare_with_own_rows(named("ragged"), self.run)

    def test_a_threshold_of_zero_skips_nothing(self):
        arguments = named("ragged").arguments(KEY)
        *got, kept = self.run(**arguments, skip_threshold=jnp.float32(0), return_kept=True)
        for x, y in zip(got, self.run(**arguments), strict=True):
            assert_within_rounding(x, y)
        seen = prefill_mask(arguments).reshape(3, 4, -1, 131, 171)  # of the blocks that a tile sees, none is left out
        seen = np.pad(seen, [(0, 0)] * 3 + [(0, -131 % 16), (0, -171 % 16)]).reshape(3, 4, 9, 16, 11, 16).any((3, 5))
        np.testing.assert_array_equal(kept, seen.sum(-1))

    def test_nothing_behind_the_end_decides_what_is_skipped(self):
        compare_padded_skipping(next(case for case in SKIPPING if case.name == "skip-ragged"), self.run)

    def test_queries_in_chunks_are_queries_at_once(self):
        case = Case("whole", Heads(4, 2, 64), 192, density=0.5, dtype="float32", block_size=32)
        whole = case.arguments(KEY)
        blocks = whole["blocks"]
        last = whole | {
            "q": whole["q"][:, 64:],
            "blocks": BlockIndices(blocks.counts[:, :, 2:], blocks.indices[:, :, 2:], 32),
            "query_offset": jnp.asarray([64]),
        }
        for at_once, chunk in zip(self.run(**whole), self.run(**last), strict=True):
            assert_within_rounding(chunk, at_once[:, 64:])

    def test_queries_that_see_no_key_have_output_zero(self):
        """Empty lists, queries beyond the sequence, lists of blocks that lie ahead, an empty sequence."""
        arguments = Case("empty", Heads(4, 2, 64), 64, batch=3, block_size=16, dtype="float32").arguments(KEY)
        counts = jnp.full((3, 4, 4), 1).at[0, :, 1].set(0)
        ahead = jnp.broadcast_to(jnp.asarray([0, 0, 3, 3])[:, None], (3, 4, 4, 1))
        arguments["blocks"] = BlockIndices(counts.astype("int32"), ahead.astype("int32"), 16)
        out, lse = self.run(**arguments | {"lengths": jnp.asarray([64, 20, 0])})
        seen = np.asarray([[True, False, False, True], [True, True, False, False], [False] * 4]).repeat(16, axis=1)
        seen[1, 20:] = False
        np.testing.assert_array_equal(lse > -jnp.inf, np.broadcast_to(seen[..., None], lse.shape))
        np.testing.assert_array_equal(np.asarray(out)[np.logical_not(seen)], 0)
        assert np.isfinite(out).all() and not np.isnan(lse).any()


class Conformance(Definition):
    """Properties that backends have beyond those of the definition: every dtype, gradients, and transformations."""

    # The others are compared with NumPy in every run.
    @pytest.mark.parametrize(
        "case", slow_but(TINY, "one-list", "no-groups", "bf16", "bf16-ragged"), ids=lambda case: case.name
    )
    def test_errs_no_more_than_plain_attention(self, case: Case):
        arguments = case.arguments(KEY)
        compare_with_plain_attention(arguments, lambda: self.run(**arguments))

    def test_fillers_and_unlisted_blocks_are_not_read(self):
        compare_with_poisoned(named("one-list").arguments(KEY), self.run)

    def test_runs_under_shard_map(self):
        compare_with_sharded(self.run, named("own-lists").arguments(KEY), HEADS, P(None, None, "model"))

    def test_maps_and_scans(self):
        """Under vmap over a batch of calls and inside a scan, the results are those of single calls."""
        case = Case("small", Heads(4, 2, 64), 40, density=0.5, dtype="float32", block_size=16)
        calls = [case.arguments(key) for key in jax.random.split(KEY, 2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
        call = functools.partial(block_sparse_attention, return_lse=True, implementation=self.implementation)
        mapped = jax.jit(jax.vmap(lambda arguments: call(**arguments)))(stacked)
        _, scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, arguments: (None, call(**arguments)), None, xs))(stacked)
        for i, arguments in enumerate(calls):
            for x, y, single in zip(mapped, scanned, self.run(**arguments), strict=True):
                assert_within_rounding(x[i], single)
                assert_within_rounding(y[i], single)

    @pytest.mark.parametrize(
        "case", slow_but([named("ragged"), named("group-lists")], "ragged"), ids=lambda case: case.name
    )
    def test_gradients_of_output_and_lse(self, case: Case):
        arguments = case.arguments(KEY)
        weights, lse_weights = np.asarray(arguments["q"]), np.asarray(arguments["q"]).sum(-1)
        qkv = {name: arguments[name] for name in ("q", "k", "v")}
        got, truth = (
            gradients_of(arguments, name, weights, lse_weights)(qkv) for name in (self.implementation, "reference")
        )
        for name in qkv:
            assert_within_rounding(got[name], truth[name])

    @pytest.mark.parametrize("case", slow_but(TINY[5:], "bf16"), ids=lambda case: case.name)
    def test_gradients_err_no_more_than_those_of_plain_attention(self, case: Case):
        compare_gradients(case, self.implementation)

    def test_empty_lists_and_unlisted_keys_have_no_gradients(self):
        compare_empty_gradients(named("own-lists").arguments(KEY), self.implementation)

    def test_padding_reaches_no_gradient(self):
        compare_padded_gradients(named("ragged"), self.implementation)


SMALL = Case("small", Heads(2, 1, 64), 70, 140, density=0.5, query_offset=(40,), lengths=(105,))
QUICK = slow_but(HALF, "half-own", "half-ragged")


class HalfPrecision(IgnoresPadding):
    """Properties of backends for GPUs, which take bfloat16 and float16, and blocks of 64 and 128 tokens."""

    implementation: ClassVar[Implementation]

    def padded(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return padded(next(case for case in HALF if case.name == "half-ragged"))

    @products_of_padding
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["half-ragged-group-lists", "half-ragged-128"])
    def test_padding_reaches_no_result_in_the_other_kernels(self, name: str):
        arguments, padding = padded(next(case for case in HALF if case.name == name))
        clean, filled = (
            self.run(**arguments | {n: fill(arguments[n], mask, values) for n, mask in padding.items()})
            for values in ((0.0,), (np.nan, np.inf))
        )
        assert_bitwise_equal(clean, filled)

    def run(self, **arguments: Any) -> tuple[jax.Array, jax.Array]:
        return compiled(self.implementation)(**arguments)

    @pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
    def test_errs_no_more_than_plain_attention(self, case: Case):
        arguments = case.arguments(KEY)
        compare_with_plain_attention(arguments, lambda: self.run(**arguments))

    @pytest.mark.parametrize("case", slow_but([HALF[0], HALF[4]], "half-own"), ids=lambda case: case.name)
    def test_expecting_density_changes_no_result(self, case: Case):
        """Although it may choose another kernel."""
        arguments = case.arguments(KEY)
        compare_with_plain_attention(arguments, lambda: self.run(**arguments, density=1.0))

    @pytest.mark.parametrize("case", SKIPPING_HALF, ids=lambda case: case.name)
    def test_skips_what_the_definition_skips(self, case: Case):
        compare_with_skipped(case, self.run)

    @products_of_padding
    def test_nothing_behind_the_end_decides_what_is_skipped(self):
        compare_padded_skipping(SKIPPING_HALF[0], self.run)

    @pytest.mark.parametrize(
        "settings", [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"lists": 1}, {"block_size": 128}))]
    )
    def test_reads_rows_of_a_cache(self, settings: dict[str, Any]):
        compare_with_own_rows(Case("rows", Heads(2, 1, 64), 128, batch=2, lengths=(128, 70), **settings), self.run)

    def test_fillers_and_unlisted_blocks_are_not_read(self):
        case = Case("few", Heads(2, 1, 64), 256, lists=1, density=0.5)
        compare_with_poisoned(case.arguments(KEY), self.run)

    @pytest.mark.parametrize(
        ("lists", "density"), [(2, None), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((2, 1.0), (1, None)))]
    )
    def test_queries_that_see_no_key_have_output_zero(self, lists: int, density: float | None):
        """Empty lists, queries beyond the sequence, lists of blocks that lie ahead, an empty sequence."""
        arguments = Case("empty", Heads(2, 1, 64), 256, batch=3, lists=lists).arguments(KEY)
        counts = jnp.full((3, lists, 4), 1).at[0, :, 1].set(0)
        ahead = jnp.broadcast_to(jnp.asarray([0, 0, 3, 3])[:, None], (3, lists, 4, 1))
        arguments["blocks"] = BlockIndices(counts.astype("int32"), ahead.astype("int32"), 64)
        out, lse = self.run(**arguments | {"lengths": jnp.asarray([256, 80, 0])}, density=density)
        seen = np.asarray([[True, False, False, True], [True, True, False, False], [False] * 4]).repeat(64, axis=1)
        seen[1, 80:] = False
        np.testing.assert_array_equal(lse > -jnp.inf, np.broadcast_to(seen[..., None], lse.shape))
        np.testing.assert_array_equal(np.asarray(out, np.float32)[np.logical_not(seen)], 0)
        assert np.isfinite(np.asarray(out, np.float32)).all() and not np.isnan(lse).any()

    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_any_scale(self, scale: float):
        arguments: dict[str, Any] = Case("scale", Heads(2, 1, 64), 128).arguments(KEY) | {"scale": scale}
        exact = arguments | {name: arguments[name].astype("float32") for name in ("q", "k", "v")}
        (out, lse), (truth, true_lse) = self.run(**arguments), compiled("reference")(**exact)
        assert_within_rounding(lse, true_lse)
        np.testing.assert_allclose(np.asarray(out, np.float32), truth, rtol=2**-7, atol=2**-7)

    def test_runs_under_shard_map(self):
        compare_with_sharded(
            self.run, Case("small", Heads(2, 2, 64), 128).arguments(KEY), HEADS, P(None, None, "model")
        )

    def test_maps(self):
        """Under vmap over a batch of calls the results are those of single calls."""
        calls = [Case("small", Heads(2, 1, 64), 128).arguments(key) for key in jax.random.split(KEY, 2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
        call = functools.partial(block_sparse_attention, return_lse=True, implementation=self.implementation)
        mapped = jax.jit(jax.vmap(lambda arguments: call(**arguments)))(stacked)
        for i, arguments in enumerate(calls):
            assert_bitwise_equal([x[i] for x in mapped], self.run(**arguments))

    @pytest.mark.parametrize("case", slow_but([SMALL, *HALF], "small"), ids=lambda case: case.name)
    def test_gradients_err_no_more_than_those_of_plain_attention(self, case: Case):
        compare_gradients(case, self.implementation)

    @pytest.mark.parametrize("settings", [{}, {"lists": 1}, {"block_size": 128}], ids=str)
    def test_empty_lists_and_unlisted_keys_have_no_gradients(self, settings: dict[str, Any]):
        case = Case("few", Heads(2, 1, 64), 512, density=0.5, **settings)
        compare_empty_gradients(case.arguments(KEY), self.implementation)

    def test_gradients_map(self):
        """Under vmap over a batch of calls gradients are those of single calls."""
        calls = [Case("small", Heads(2, 1, 64), 128).arguments(key) for key in jax.random.split(KEY, 2)]

        def gradients(call: dict[str, Any]) -> Any:
            qkv = {name: call[name] for name in ("q", "k", "v")}
            return gradients_of(call, self.implementation, call["q"], jnp.ones(call["q"].shape[:3]))(qkv)

        mapped = jax.jit(jax.vmap(gradients))(jax.tree.map(lambda *x: jnp.stack(x), *calls))
        for i, call in enumerate(calls):
            assert_bitwise_equal(jax.tree.map(lambda x, i=i: x[i], mapped), gradients(call))

    @products_of_padding
    @pytest.mark.parametrize("case", HALF[4:], ids=lambda case: case.name)
    def test_no_gradient_sees_padding(self, case: Case):
        compare_padded_gradients(case, self.implementation)

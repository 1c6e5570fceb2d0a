"""Block maps against the model's own choice of blocks, at prefill and while decoding, and their picture."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.models.decoder import Transformer
from seer_jax.plots import BlockMaps, block_maps, decode_block_maps, far_sighted_heads, plot_block_maps
from seer_jax.plots.maps import spread_tokens
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import RankingPolicy, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Oracle, SinkWindow
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, 120).astype(np.int32))
BLOCKS = 8  # of 16 tokens, the last one unfinished
HEADS = LLAMA.num_heads


@functools.cache
def model() -> Transformer:
    return tiny_model()


def maps_of(policy: RankingPolicy) -> BlockMaps:
    return jax.device_get(block_maps(model(), TOKENS, policy))


def test_nothing_is_above_the_diagonal_and_rows_sum_to_one():
    maps = maps_of(TopK(0.4, dense_last_rows=0))
    above = np.triu(np.ones((BLOCKS, BLOCKS), bool), 1)
    for values in (maps.true, maps.scores, maps.kept):
        assert values.shape == (LLAMA.num_layers, HEADS, BLOCKS, BLOCKS)
        assert not values[..., above].any()
    np.testing.assert_allclose(maps.true.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(maps.scores.sum(-1), 1, rtol=1e-5)


def test_top_k_keeps_the_best_blocks_of_each_row_and_its_own():
    policy = TopK(0.7, dense_last_rows=0)
    maps, k = maps_of(policy), policy.blocks_per_row(BLOCKS)
    assert k == math.floor((1 - math.sqrt(0.3)) * BLOCKS) == 3
    threshold = np.sort(maps.scores, axis=-1)[..., -k][..., None]  # 0 above the diagonal
    expected = (maps.scores >= threshold) & np.tri(BLOCKS, dtype=bool) | np.eye(BLOCKS, dtype=bool)
    np.testing.assert_array_equal(maps.kept, expected)


def test_the_oracle_ranks_by_the_true_map():
    maps = maps_of(TokenBudget(32, Oracle()))
    np.testing.assert_allclose(maps.scores, maps.true, rtol=1e-5, atol=1e-7)


def test_lists_that_heads_share_are_repeated():
    maps = maps_of(TokenBudget(48, SinkWindow()))
    row, column = np.indices((BLOCKS, BLOCKS))
    window = ((column == 0) | (column > row - 2)) & (column <= row)
    np.testing.assert_array_equal(maps.kept, np.broadcast_to(window, maps.kept.shape))


@pytest.mark.slow
def test_policies_per_layer_and_head_and_dense_layers():
    causal = np.tri(BLOCKS, dtype=bool)
    thresholds = jnp.asarray([[0.0, 0.99, 0.99, 0.99]] * 2)
    maps = maps_of(Threshold(thresholds, dense_last_rows=0))
    np.testing.assert_array_equal(maps.kept[:, 0], np.broadcast_to(causal, (2, BLOCKS, BLOCKS)))
    assert maps.kept[:, 1:].mean() < 0.5 * causal.mean()
    maps = maps_of(TopK(0.1, dense_last_rows=0, dense_layers=1))
    assert (maps.kept[0] == causal).all() and maps.kept[1].mean() < 0.5 * causal.mean()


def test_a_gate_is_needed_by_policies_that_rank_by_it():
    without = tiny_model(gates=False)
    with pytest.raises(ValueError, match="ranks blocks by a learned gate"):
        block_maps(without, TOKENS, TopK(0.4))
    assert block_maps(without, TOKENS, TopK(0.4, SinkWindow())).kept.shape == (2, HEADS, 2, 2)  # blocks of 64


def test_far_sighted_heads_look_beyond_the_window():
    true = np.zeros((2, 3, 6, 6), np.float32)
    true[:, :, 5, 5] = 1
    true[0, 2, 5, 2] = true[1, 1, 5, 1] = 2
    true[1, 0, 5, 2] = 1
    maps = BlockMaps(true, true, true > 0, np.ones((2, 3), np.float32), np.arange(6), 1)
    assert far_sighted_heads(maps, 2) == [(0, 2), (1, 1)]
    assert far_sighted_heads(maps, 3) == [(0, 2), (1, 0), (1, 1)]


def test_density_counts_the_kept_blocks():
    maps = maps_of(TopK(0.4, dense_last_rows=0))
    visible = np.tri(BLOCKS).sum()
    np.testing.assert_allclose(maps.density, maps.kept.sum((2, 3)) / visible, rtol=1e-6)
    np.testing.assert_array_equal(maps.visible, np.arange(1, BLOCKS + 1))


@pytest.mark.slow
def test_decode_maps_are_those_of_tokens_decoded_one_by_one():
    policy = TopK(0.4)
    whole = jax.device_get(decode_block_maps(model(), TOKENS, policy))
    assert whole.kept.shape == (LLAMA.num_layers, LLAMA.num_kv_heads, len(TOKENS), BLOCKS)
    np.testing.assert_allclose(whole.density, whole.kept.sum((2, 3)) / whole.visible.sum(), rtol=1e-6)
    # What attention reads when the token is appended to the cache of those before it.
    last = len(TOKENS) - 1
    _, cache, _ = model().prefill(TOKENS[None, :-1], None, model().make_cache(1, len(TOKENS)), sparsity=Dense())
    _, _, kept = model().decode(TOKENS[-1:], cache, sparsity=policy)
    shares = whole.kept[:, :, last].sum(-1).mean(-1) / whole.visible[last]
    assert shares[0] == pytest.approx(float(kept[0, 0]), rel=1e-6)  # deeper layers read what sparse attention gave
    completed = np.arange(BLOCKS) < (whole.visible - 1)[:, None]
    assert not whole.scores[:, :, ~completed].any()
    np.testing.assert_allclose(whole.scores[:, :, completed.any(-1)].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(whole.true.sum(-1), 1, rtol=1e-5)
    own = np.arange(BLOCKS) == (whole.visible - 1)[:, None]
    assert whole.kept[:, :, own].all() and not whole.kept[:, :, ~completed & ~own].any()


def test_the_oracle_s_decode_scores_are_the_true_map_of_completed_blocks():
    maps = jax.device_get(decode_block_maps(model(), TOKENS, TokenBudget(32, Oracle()), rows=40))
    np.testing.assert_array_equal(maps.last, spread_tokens(len(TOKENS), 40))
    completed = np.arange(BLOCKS) < (maps.visible - 1)[:, None]
    weights = np.where(completed, maps.true, 0)
    sums = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(maps.scores, np.divide(weights, sums, where=sums > 0, out=weights), rtol=1e-4, atol=1e-6)


def test_spread_tokens_are_one_of_each_stretch():
    places = spread_tokens(1000, 10)
    np.testing.assert_array_equal(places // 100, np.arange(10))
    assert len({place % 16 for place in places.tolist()}) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rows=0), "rows must be at least 1; got 0"),
        (dict(policy=Dense()), "policy must rank blocks, as TopK"),
        (dict(tokens=TOKENS[None]), r"tokens must be integers \[T\], one prompt; got shape \(1, 120\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_decode_maps_refuse(settings: dict[str, Any], message: str):
    given: dict[str, Any] = dict(tokens=TOKENS, policy=TopK(0.4)) | settings
    with pytest.raises(ValueError, match=message):
        decode_block_maps(model(), **given)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures_have_the_format_of_their_suffix(tmp_path: Path, suffix: str, start: bytes):
    maps, path = maps_of(TopK(0.4, dense_last_rows=0)), tmp_path / f"new/maps{suffix}"
    assert plot_block_maps(path, maps, [(1, 3)], decode=suffix == ".svg").read_bytes().startswith(start)


def test_heads_of_a_picture_must_be_there(tmp_path: Path):
    maps = maps_of(TopK(0.4, dense_last_rows=0))
    with pytest.raises(ValueError, match=r"layer < 2 and head < 4; got \(2, 0\)"):
        plot_block_maps(tmp_path / "x.png", maps, [(2, 0)])

"""Block maps against the model's own choice of blocks, and the plot of them."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.models.decoder import Transformer
from seer_jax.plots import BlockMaps, block_maps, far_sighted_heads, plot_block_maps
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
    maps = BlockMaps(true, true, true > 0)
    assert far_sighted_heads(maps, 2) == [(0, 2), (1, 1)]
    assert far_sighted_heads(maps, 3) == [(0, 2), (1, 0), (1, 1)]


def test_plots_are_png_files(tmp_path: Path):
    pytest.importorskip("matplotlib")
    maps = maps_of(TopK(0.4, dense_last_rows=0))
    path = plot_block_maps(tmp_path / "new" / "maps.png", maps, [(0, 1), (1, 3)], title="maps", scorer="gate")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"layer < 2 and head < 4; got \(2, 0\)"):
        plot_block_maps(tmp_path / "x.png", maps, [(2, 0)])

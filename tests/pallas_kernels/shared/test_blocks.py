"""`BlockIndices`: to and from masks, as a pytree, and its checks."""

from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices
from tests.pallas_kernels.suites.comparison import listed_blocks, with_fillers

SHAPE = (2, 3, 7)
MASKS = arrays.arrays(np.bool_, SHAPE)

_from_mask = jax.jit(BlockIndices.from_mask, static_argnames=("block_size", "max_blocks"))
_to_mask = jax.jit(BlockIndices.to_mask, static_argnums=1)


def lists(counts: Any, indices: Any, block_size: int = 64) -> BlockIndices:
    return BlockIndices(jnp.asarray(counts, jnp.int32), jnp.asarray(indices, jnp.int32), block_size)


@hypothesis.given(mask=MASKS, filler=st.integers(-(2**31), 2**31 - 1))
def test_masks_come_back(mask: np.ndarray, filler: int):
    blocks = _from_mask(mask, block_size=16).check(SHAPE[-1])
    np.testing.assert_array_equal(_to_mask(blocks, SHAPE[-1]), mask)
    filled = with_fillers(blocks, filler).check(SHAPE[-1])
    np.testing.assert_array_equal(_to_mask(filled, SHAPE[-1]), mask)


@hypothesis.given(mask=MASKS)
def test_lists_ascend_and_end_in_zeros(mask: np.ndarray):
    blocks = _from_mask(mask, block_size=16)
    for row in np.ndindex(mask.shape[:-1]):
        kept = np.flatnonzero(mask[row])
        assert blocks.counts[row] == len(kept)
        np.testing.assert_array_equal(blocks.indices[row], np.pad(kept, (0, SHAPE[-1] - len(kept))))


@hypothesis.given(mask=MASKS)
def test_a_narrow_list_under_jit_loses_the_highest_blocks(mask: np.ndarray):
    blocks = _from_mask(mask, block_size=16, max_blocks=3).check(SHAPE[-1])
    assert blocks.width == 3
    np.testing.assert_array_equal(_to_mask(blocks, SHAPE[-1]), mask & (mask.cumsum(-1) <= 3))


def test_a_narrow_list_that_loses_blocks_is_refused():
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    assert BlockIndices.from_mask(mask[:1], block_size=64, max_blocks=2).width == 2
    with pytest.raises(
        ValueError, match=r"no row may keep more than max_blocks=2 blocks; got a row with 3. Raise max_blocks"
    ):
        BlockIndices.from_mask(mask, block_size=64, max_blocks=2)


@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(100, 100, 0), (64, 128, 64), (40, 100, 55), (40, 64, 50), (17, 99, -3)]
)
def test_all_causal_lists_every_visible_block(queries: int, keys: int, offset: int):
    blocks = BlockIndices.all_causal(queries, keys, block_size=16, query_offset=offset, batch=2, lists=3).check(
        -(-keys // 16)
    )
    listed = listed_blocks(blocks, -(-keys // 16))
    seen = np.arange(keys) <= offset + np.arange(queries)[:, None]
    for row in range(-(-queries // 16)):
        tokens = seen[row * 16 : (row + 1) * 16].any(0)
        expected = [tokens[i : i + 16].any() for i in range(0, keys, 16)]
        np.testing.assert_array_equal(listed[:, :, row], np.broadcast_to(expected, (2, 3, len(expected))))


def test_all_causal_takes_an_offset_for_each_sequence():
    blocks = BlockIndices.all_causal(16, 64, block_size=16, query_offset=jnp.asarray([0, 40]), batch=2)
    np.testing.assert_array_equal(blocks.counts, [[[1]], [[4]]])


def test_density():
    blocks = lists([[1, 1, 3, 1], [1, 2, 3, 4]], np.zeros((2, 4, 4)))
    np.testing.assert_allclose(blocks.density(), [0.6, 1.0])
    np.testing.assert_allclose(blocks.density(jnp.full((2, 4), 12)), [0.125, 10 / 48])
    assert lists([0], [[0]]).density(jnp.zeros(1, int)) == 0


def test_is_a_pytree():
    """Block size is static, leaves may be anything, and transformations see the arrays."""
    blocks = lists([[1, 2]], [[[0, 0], [0, 1]]])
    assert jax.tree.map(lambda x: x.shape, blocks).indices == (1, 2, 2)
    assert jax.eval_shape(lambda x: x, blocks).counts == jax.ShapeDtypeStruct((1, 2), jnp.int32)
    assert jax.tree.structure(blocks) != jax.tree.structure(lists([[1, 2]], [[[0, 0], [0, 1]]], 128))
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(blocks)] == [".counts", ".indices"]
    mapped = jax.vmap(lambda row: row.to_mask(2))(blocks)
    np.testing.assert_array_equal(mapped, blocks.to_mask(2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("counts", "indices", "block_size", "message"),
    [
        (
            np.ones(2, np.int32),
            np.zeros((2, 3), np.int32),
            60,
            r"block_size must be one of \(16, 32, 64, 128\) tokens; got 60",
        ),
        (np.ones(2, np.int64), np.zeros((2, 3), np.int32), 64, r"counts must be int32; got int64"),
        (np.ones(2, np.int32), np.zeros((2, 3), np.float32), 64, r"indices must be int32; got float32"),
        (
            np.ones(3, np.int32),
            np.zeros((2, 3), np.int32),
            64,
            r"same leading axes; got counts \(3,\) and indices \(2, 3\)",
        ),
        (
            np.ones((), np.int32),
            np.zeros(3, np.int32),
            64,
            r"counts must be \[..., R\] .*; got counts \(\) and indices \(3,\)",
        ),
    ],
)
def test_refuses(counts: Any, indices: Any, block_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        BlockIndices(counts, indices, block_size)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": jnp.ones((2, 3))}, r"mask must be a bool array \[..., R, Sb\]; got float32 \(2, 3\)"),
        ({"mask": jnp.ones(3, bool)}, r"mask must be a bool array \[..., R, Sb\]; got bool \(3,\)"),
        ({"mask": jnp.ones((2, 3), bool), "max_blocks": 0}, r"max_blocks must be at least 1; got 0"),
    ],
)
def test_from_mask_refuses(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        BlockIndices.from_mask(**arguments, block_size=64)


def test_all_causal_refuses_other_block_sizes():
    with pytest.raises(ValueError, match=r"all_causal: block_size must be one of .* tokens; got 0"):
        BlockIndices.all_causal(64, 64, block_size=0)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lists([1, 4], [[0, 1, 2]] * 2), r"counts must lie from 0 to the width N=3; got 1 to 4"),
        (lists([-1, 2], [[0, 1, 2]] * 2), r"counts must lie from 0 to the width N=3; got -1 to 2"),
        (lists([1, 3], [[0, 1, 5]] * 2), r"indices must lie from 0 to Sb - 1 = 4; got 0 to 5"),
        (lists([1, 2], [[0, 1, 9], [-1, 1, 2]]), r"indices must lie from 0 to .*; got -1 to 1"),
        (lists([3, 2], [[0, 1, 2], [1, 1, 0]]), r"must ascend without repeats; got \[1, 1\] at row \(1,\)"),
        (lists([3, 2], [[0, 2, 1], [0, 1, 0]]), r"must ascend without repeats; got \[0, 2, 1\] at row \(0,\)"),
    ],
)
def test_check_refuses_invalid_lists(blocks: BlockIndices, message: str):
    with pytest.raises(ValueError, match=message):
        blocks.check(5)
    jax.jit(lambda x: x.check(5))(blocks)  # nothing is checked under jit


def test_check_returns_valid_lists():
    blocks = lists([[0, 3]], [[[-7, 4, 99], [0, 1, 4]]])
    assert blocks.check(5) is blocks

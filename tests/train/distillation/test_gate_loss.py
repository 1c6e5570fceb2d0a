"""The losses, the rows they take, and block recall, each against a definition in a few lines of NumPy."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.train.data.packing import Packing, pack
from seer_jax.train.data.store import TokenStore
from seer_jax.train.loss import (
    RECALL_ROWS,
    block_recall,
    decode_rows,
    lm_loss,
    lm_targets,
    prefill_rows,
    row_kl,
    row_weights,
)

BLOCK = 16

pytestmark = pytest.mark.usefixtures("compile_quickly")


def random_rows(seed: int, *, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets and logits [2, 3, 5, 7] with masked entries; with `empty`, some rows are masked wholly."""
    rng = np.random.default_rng(seed)
    masked = rng.random((2, 3, 5, 7)) < 0.4
    masked[..., 0] = False
    if empty:
        masked[:, :, 1] = True
    target = np.where(masked, 0, rng.random(masked.shape)).astype(np.float32)
    target[:, :, 2, 0] = 0  # a block in sight that nothing looks at
    target /= np.maximum(target.sum(-1, keepdims=True), 1e-30)
    return target, np.where(masked, -np.inf, 3 * rng.normal(size=masked.shape)).astype(np.float32)


def kl(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The definition, in float64 and over the entries that are not masked."""
    out = np.zeros(target.shape[:-1])
    for row in np.ndindex(out.shape):
        seen = logits[row] > -np.inf
        p, x = target[row][seen].astype(float), logits[row][seen].astype(float)
        log_q = x - np.log(np.exp(x).sum()) if seen.any() else x
        out[row] = sum(a * (np.log(a) - b) for a, b in zip(p, log_q, strict=True) if a > 0)
    return out


@pytest.mark.parametrize("empty", [False, True])
def test_kl_and_its_gradient(empty):
    target, logits = random_rows(0, empty=empty)
    np.testing.assert_allclose(row_kl(jnp.asarray(target), jnp.asarray(logits)), kl(target, logits), atol=1e-6)
    gradient = jax.grad(lambda x: row_kl(jnp.asarray(target), x).sum())(jnp.asarray(logits))
    seen = logits > -np.inf
    softmax = np.where(seen, np.exp(logits), 0)
    softmax /= np.maximum(softmax.sum(-1, keepdims=True), 1e-30)
    expected = softmax * target.sum(-1, keepdims=True) - target
    np.testing.assert_allclose(gradient, expected, atol=1e-6)  # 0 where masked, and in empty rows


def test_kl_is_zero_at_the_target_alone():
    target, _ = random_rows(1, empty=False)
    log_target = jnp.log(jnp.asarray(target))
    np.testing.assert_allclose(row_kl(jnp.asarray(target), log_target), 0, atol=1e-6)
    assert (row_kl(jnp.asarray(target), log_target * 0.5) > 0).all()


def test_kl_of_confident_scores():
    # exp(-200) is 0 in float32; the logarithm must not see it.
    loss, gradient = jax.value_and_grad(lambda x: row_kl(jnp.array([0.5, 0.5]), x))(jnp.array([100.0, -100.0]))
    np.testing.assert_allclose(loss, 100 - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.5, -0.5])


@pytest.mark.parametrize("side", [0, 1])
def test_nan_does_not_pass_for_a_mask(side):
    rows = [jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0])]
    rows[side] = rows[side].at[0].set(jnp.nan)
    assert jnp.isnan(row_kl(*rows))


@given(st.lists(st.integers(1, 150), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_rows_that_count(lengths, skip):
    store = TokenStore.from_documents([np.zeros(n) for n in lengths])
    data = pack(store, Packing.BEST_FIT, row_length=128, block_size=BLOCK, min_length=1)
    for row in map(data.__getitem__, range(len(data))):
        ids, positions = (jnp.asarray(x)[None] for x in (row.segment_ids, row.positions))
        expected_prefill, expected_decode = np.zeros(128 // BLOCK, bool), np.zeros(128, bool)
        for segment in range(1, row.segment_ids.max() + 1):
            start, length = np.flatnonzero(row.segment_ids == segment)[0], (row.segment_ids == segment).sum()
            blocks = -(-length // BLOCK)
            expected_prefill[start // BLOCK + int(skip * blocks) : start // BLOCK + blocks] = True
            expected_decode[start + max(int(skip * length), BLOCK) : start + length] = True
        np.testing.assert_array_equal(prefill_rows(ids, positions, block_size=BLOCK, skip=skip)[0], expected_prefill)
        np.testing.assert_array_equal(decode_rows(ids, positions, block_size=BLOCK, skip=skip)[0], expected_decode)


def test_weights_of_rows():
    rows = jnp.array([[True, False], [True, True]])
    np.testing.assert_allclose(row_weights(rows), np.array([[1, 0], [1, 1]]) / 3)
    np.testing.assert_array_equal(row_weights(rows & False), 0)


def recall(target, logits, density, weights=None):
    weights = jnp.ones(target.shape[::2][:2]) if weights is None else weights
    total, weight = block_recall(jnp.asarray(target), jnp.asarray(logits), weights, density)
    return float(total / weight)


@pytest.mark.parametrize("density", ["0.01", "0.3", "0.6", "1"])
def test_block_recall(density):
    target, logits = random_rows(2, empty=False)
    shares = []
    for row in np.ndindex(target.shape[:3]):
        kept = math.ceil(Fraction(density) * int((logits[row] > -np.inf).sum()))
        best = np.sort(target[row])[::-1][:kept].sum()
        shares.append(target[row][np.argsort(-logits[row], kind="stable")[:kept]].sum() / best)
    assert recall(target, logits, float(density)) == pytest.approx(np.mean(shares), abs=1e-6)
    perfect = np.log(target, where=target > 0, out=np.full_like(target, -np.inf))
    assert recall(target, perfect, float(density)) == pytest.approx(1)


def test_block_recall_weighs_rows_and_samples_long_inputs():
    rows = 3 * RECALL_ROWS
    target = np.zeros((1, 1, rows, 2), np.float32)
    target[..., 0] = 1
    logits = np.tile(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), (RECALL_ROWS, 1))[None, None]
    assert recall(target, logits, 0.5) == 1  # every third row is looked at, and those are right
    assert recall(target[:, :, :6], logits[:, :, :6], 0.5) == pytest.approx(1 / 3)  # here all of them
    weights = jnp.array([[1.0, 3.0, 0.0]])
    assert recall(target[:, :, :3], logits[:, :, :3], 0.5, weights) == pytest.approx(1 / 4)


def test_targets_end_with_their_sequence():
    tokens, ids = jnp.array([[5, 6, 7, 8, 9, 0]]), jnp.array([[1, 1, 2, 2, 2, 0]])
    following, counts = lm_targets(tokens, ids)
    np.testing.assert_array_equal(counts, [[True, False, True, True, False, False]])
    np.testing.assert_array_equal(following[counts], [6, 8, 9])


@pytest.mark.parametrize("length", [7, 700])
def test_lm_loss_by_chunks_is_the_plain_one(length):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (2, length, 8)), jax.random.normal(keys[1], (11, 8))
    targets, weights = jax.random.randint(keys[2], (2, length), 0, 11), jax.random.uniform(keys[3], (2, length))

    def plain(hidden, head):
        log_probability = jax.nn.log_softmax(hidden @ head.T)
        return -(weights * jnp.take_along_axis(log_probability, targets[..., None], -1)[..., 0]).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head)
        for f in (lambda h, w: lm_loss(h, w, targets, weights), plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), ours, theirs)

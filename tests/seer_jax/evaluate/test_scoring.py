"""Scores of given tokens against their definition, in one pass and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.evaluate import perplexity, score_decoded, score_prompts
from seer_jax.evaluate.scoring import read_prompts
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import Random
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32)


def test_scores_of_prompts_are_those_of_the_logits():
    model = tiny_model()
    scores = score_prompts(model, jnp.asarray(TOKENS), TopK(0.4))
    log_p = jax.nn.log_softmax(model(jnp.asarray(TOKENS), sparsity=TopK(0.4))[:, :-1])
    expected = -np.take_along_axis(np.asarray(log_p), TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.nll, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(scores.best, np.asarray(log_p).argmax(-1) == TOKENS[:, 1:])
    assert ((scores.kept > 0.2) & (scores.kept < 0.8)).all()


@pytest.mark.slow
def test_scores_of_decoded_tokens_are_those_of_the_prompt():
    """Dense decoding computes what a dense pass does, from any place on."""
    model = tiny_model()
    whole = score_prompts(model, jnp.asarray(TOKENS))
    read, cache = read_prompts(model, jnp.asarray(TOKENS), keep=60)
    np.testing.assert_allclose(read.nll, whole.nll, rtol=1e-5, atol=1e-5)
    decoded = score_decoded(model, cache, jnp.asarray(TOKENS[:, 60:]))
    np.testing.assert_allclose(decoded.nll, whole.nll[:, -35:], rtol=1e-4, atol=1e-5)
    sparse = score_decoded(model, cache, jnp.asarray(TOKENS[:, 60:]), TokenBudget(32, Random()))
    assert (sparse.kept < 0.6).all()
    assert np.abs(np.asarray(sparse.nll) - decoded.nll).max() > 1e-3


def test_perplexity():
    assert perplexity(np.full((2, 3), np.log(7.0))) == pytest.approx(7)

"""Evaluation against its definitions: scores of given tokens, in one pass and token by token, and the comparison built on them."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from seer_jax.evaluate import (
    EvalConfig,
    Method,
    PassKeyPrompt,
    Phase,
    Rows,
    Setting,
    compare,
    perplexity,
    score_decoded,
    score_prompts,
    text_windows,
)
from seer_jax.commands.eval import policy_name
from seer_jax.evaluate.scoring import read_prompts
from seer_jax.evaluate.table import print_scores, write_scores
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import Oracle, Random
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


def rows(decoded: int = 16) -> Rows:
    prompt = PassKeyPrompt(name="x", answer="12345", depth=0.1, tokens=TOKENS[1], answer_length=5)
    return Rows(TOKENS[:1], [prompt], decoded)


@pytest.mark.slow
def test_every_method_is_compared_at_every_setting(tmp_path: Path):
    model = tiny_model()
    settings = [Setting("40%", TopK(0.4)), Setting("all", TopK(1.0))]
    scores = list(compare(model, rows(), settings))
    assert len(scores) == 2 * (1 + 2 * len(Method))
    for phase in Phase:
        of = {(s.method, s.setting): s for s in scores if s.phase is phase}
        dense = of[None, "dense"]
        for method in Method:
            assert of[method, "all"].perplexity == pytest.approx(dense.perplexity, rel=1e-4)
            assert of[method, "40%"].kept < of[method, "all"].kept == pytest.approx(1)
    out = io.StringIO()
    print_scores(Console(file=out, width=100), scores)
    for method in Method:
        assert method.title in out.getvalue()
    write_scores(tmp_path / "scores.json", scores, model="tiny")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["model"] == "tiny"
    assert [s["perplexity"] for s in written["scores"]] == [s.perplexity for s in scores]


def test_a_phase_without_a_gate_has_no_learned_row():
    model = tiny_model(gates=False)
    setting = Setting("budget", TokenBudget(64))
    got = [(s.phase, s.method) for s in compare(model, rows(), [setting], methods=(Method.GATE,))]
    assert got == [(phase, None) for phase in Phase]


def test_a_setting_makes_the_question_as_sparse_as_the_rest():
    assert Setting("x", TopK(0.1)).of(Method.ORACLE) == TopK(0.1, Oracle(), dense_last_rows=0)


def test_columns_tell_settings_apart():
    assert policy_name(TopK(0.1)) == "10%"
    assert policy_name(TopK(0.1, dense_layers=2)) == "topk:0.1,dense_layers=2"
    policy = Setting("x", TokenBudget(64, dense_layers=2)).of(Method.ORACLE)
    assert policy == TokenBudget(64, Oracle(), dense_layers=2)


def test_windows_follow_one_another():
    text = np.arange(103)
    np.testing.assert_array_equal(text_windows(text, 10), np.arange(100).reshape(10, 10))
    np.testing.assert_array_equal(text_windows(text, 10, 3)[:, 0], [0, 40, 90])
    assert perplexity(np.full((2, 3), np.log(7.0))) == pytest.approx(7)


BAD = [
    (lambda: text_windows(np.arange(5), 6), "expected 6 tokens or more; got 5"),
    (lambda: rows(decoded=5), "answers of 5 tokens; got decoded=5"),
    (lambda: rows(decoded=96), "leave a prompt; got 96 of 96"),
    (lambda: EvalConfig(length=0), "length is at least 1; got 0"),
    (lambda: EvalConfig(passkeys=-1), "passkeys is at least 0; got -1"),
    (lambda: EvalConfig(policies=(Dense(),)), "policies that rank blocks.*got Dense"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()

"""Comparisons of scorers: which methods are measured at which levels, and tables and JSON of the scores."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from seer_jax.evaluate import (
    EvalRows,
    PassKeyPrompt,
    Phase,
    Score,
    SparsityLevel,
    all_methods,
    compare,
    legend,
    level_name,
    recommended_levels,
    table_rows,
    write_scores,
)
from seer_jax.evaluate.table import losses, print_scores
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Scorer, SinkWindow
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32)


def rows(decoded: int = 16) -> EvalRows:
    prompt = PassKeyPrompt(name="x", answer="12345", depth=0.1, tokens=TOKENS[1], answer_length=5)
    return EvalRows(TOKENS[:1], [prompt], decoded)


@pytest.mark.slow
def test_every_method_is_compared_at_every_level(tmp_path: Path):
    levels = [SparsityLevel("40%", TopK(0.4)), SparsityLevel("all", TopK(1.0))]
    scores = list(compare(tiny_model(), rows(), levels))
    names = [method.name for method in all_methods()]
    assert [(s.phase, s.method, s.level) for s in scores] == [
        (phase, method, level)
        for phase in Phase
        for method, level in [(None, "dense"), *((name, level.name) for level in levels for name in names)]
    ]
    for phase in Phase:
        of = {(s.method, s.level): s for s in scores if s.phase is phase}
        dense = of[None, "dense"]
        for name in names:
            assert of[name, "all"].perplexity == pytest.approx(dense.perplexity, rel=1e-4)
            assert of[name, "40%"].kept < of[name, "all"].kept == pytest.approx(1)
    write_scores(tmp_path / "scores.json", scores, model="tiny")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["model"] == "tiny"
    assert [s["perplexity"] for s in written["scores"]] == [s.perplexity for s in scores]


def test_methods_come_from_the_registry():
    names = [method.name for method in all_methods()]
    assert names[:3] == ["gate", "window", "random"] and names[-1] == "oracle"
    assert sorted(names) == sorted(SCORERS)


def test_a_phase_without_a_gate_has_no_learned_method():
    level = SparsityLevel("budget", TokenBudget(64))
    got = [(s.phase, s.method) for s in compare(tiny_model(gates=False), rows(), [level], methods=(LearnedGate(),))]
    assert got == [(phase, None) for phase in Phase]


def test_a_level_may_be_for_one_phase():
    level = SparsityLevel("budget", TokenBudget(64), (Phase.DECODE,))
    got = [(s.phase, s.method) for s in compare(tiny_model(gates=False), rows(), [level], methods=(SinkWindow(),))]
    assert got == [(Phase.PREFILL, None), (Phase.DECODE, None), (Phase.DECODE, "window")]


def test_a_level_makes_the_question_as_sparse_as_the_rest():
    assert SparsityLevel("x", TopK(0.1)).policy_of(Oracle()) == TopK(0.1, Oracle(), dense_last_rows=0)
    policy = SparsityLevel("x", TokenBudget(64, dense_layers=2)).policy_of(Oracle())
    assert policy == TokenBudget(64, Oracle(), dense_layers=2)


def test_names_tell_levels_apart():
    assert level_name(TopK(0.1)) == "10%"
    assert level_name(TopK(0.1, dense_layers=2)) == "topk:0.1,dense_layers=2"


def test_what_gates_recommend_is_a_level_of_their_phase():
    model = tiny_model()
    assert model.prefill_gate is not None and model.decode_gate is not None
    assert recommended_levels(model) == []
    model.prefill_gate.recommended = Threshold(jnp.full((2, 4), 0.5))
    model.decode_gate.recommended = Dense()
    (level,) = recommended_levels(model)
    assert (level.name, level.phases) == ("threshold:[2 x 4]", (Phase.PREFILL,))
    np.testing.assert_array_equal(level.policy.threshold, np.full((2, 4), 0.5))  # pyright: ignore[reportAttributeAccessIssue]
    model.decode_gate.recommended = TokenBudget(64)
    assert recommended_levels(model)[1] == SparsityLevel("budget:64", TokenBudget(64), (Phase.DECODE,))
    assert recommended_levels(tiny_model(gates=False)) == []


def score(phase: Phase, method: str | None, level: str, perplexity: float, passkey: float) -> Score:
    return Score(phase, method, level, 0.25, perplexity, 10, passkey, passkey, 3, 1.0)


SCORES = [
    score(Phase.PREFILL, None, "dense", 5.0, 1.0),
    score(Phase.PREFILL, "gate", "10%", 6.0, 0.5),
    score(Phase.PREFILL, "window", "10%", 6.0, 0.25),
    score(Phase.DECODE, None, "dense", 4.0, math.nan),
    score(Phase.DECODE, "gate", "10%", 4.5, 1.0),
    score(Phase.DECODE, "random", "10%", 9.0, 1.0),
    score(Phase.DECODE, "gate", "budget:64", 4.25, 1.0),
]


def test_the_table_as_data():
    assert table_rows(SCORES) == [
        ["phase", "method", "ppl 10%", "ppl budget:64", "keys 10%", "keys budget:64", "read 10%", "read budget:64"],
        ["prefill", "dense", "5.00", "5.00", "100%", "100%", "25%", "25%"],
        ["prefill", "learned gate", "6.00", "-", "50%", "-", "25%", "-"],
        ["prefill", "sink+window", "6.00", "-", "25%", "-", "25%", "-"],
        ["decode", "dense", "4.00", "4.00", "-", "-", "25%", "25%"],
        ["decode", "learned gate", "4.50", "4.25", "100%", "100%", "25%", "25%"],
        ["decode", "random", "9.00", "-", "100%", "-", "25%", "-"],
    ]


@pytest.mark.parametrize("levels", [0, 4, 9])
def test_many_levels_have_a_row_each_and_fit_a_terminal(levels: int):
    gate = [score(Phase.PREFILL, "gate", f"threshold:[{i} x 8]", 6.0 + i, 0.5) for i in range(levels)]
    scores = [score(Phase.PREFILL, None, "dense", 5.0, 1.0), *gate]
    head, dense, *rows = table_rows(scores)
    assert head == ["phase", "method", "level", "ppl", "keys", "read"]
    assert dense == ["prefill", "dense", "dense", "5.00", "100%", "25%"]
    assert [row[2:4] for row in rows] == [[s.level, f"{s.perplexity:.2f}"] for s in gate]
    out = io.StringIO()
    print_scores(Console(file=out, width=80), scores)
    assert "…" not in out.getvalue() and all(f"{s.perplexity:.2f}" in out.getvalue() for s in scores)


def test_the_printed_table_explains_its_words():
    out = io.StringIO()
    print_scores(Console(file=out, width=120), SCORES)
    assert list(legend(SCORES)) == [
        *("ppl", "keys", "read", "prefill", "decode", "dense", "learned gate", "sink+window", "random"),
    ]
    for word, meaning in legend(SCORES).items():
        assert f"{word}: {meaning}" in out.getvalue()
    assert legend(SCORES)["sink+window"] == SinkWindow.meaning
    assert "oracle" not in out.getvalue()


def test_missing_pass_keys_are_null(tmp_path: Path):
    write_scores(tmp_path / "scores.json", SCORES)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [s["passkey"] for s in written["scores"]] == [1.0, 0.5, 0.25, None, 1.0, 1.0, 1.0]
    assert [s["method"] for s in written["scores"]][:3] == [None, "gate", "window"]
    assert written["legend"] == legend(SCORES)


def test_places_where_a_baseline_wins_are_listed():
    assert losses(SCORES) == [
        "prefill 10%: sink+window has perplexity 6.000, ours 6.000",
        "decode 10%: random finds 100% of the pass keys, ours 100%",
    ]
    assert losses(SCORES, baselines=()) == []


class Unregistered(Scorer):
    name, title, meaning = "unregistered", "unregistered", "nothing"

    def prefill_scores(self, context: Any) -> Any:
        raise AssertionError

    def decode_scores(self, context: Any) -> Any:
        raise AssertionError


BAD = [
    (lambda: rows(decoded=5), "greater than the 5 tokens of the longest answer; got 5"),
    (lambda: rows(decoded=1), "at least 2 and less than the 96 tokens of a row; got 1"),
    (lambda: rows(decoded=96), "less than the 96 tokens of a row; got 96"),
    (lambda: compare(tiny_model(), rows(), [], methods=[Unregistered()]), "registered scorers.*got <.*Unregistered"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()

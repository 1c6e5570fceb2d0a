"""Comparisons of scorers: which methods are measured at which levels, and what is not measured again."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.evaluate import (
    EvalRows,
    PassKeyPrompt,
    Phase,
    SparsityLevel,
    all_methods,
    compare,
    comparison,
    level_name,
    parse_level,
    plan_measurements,
    recommended_levels,
)
from seer_jax.evaluate.notes import Row, equal_counts, left_out, recommendations, repeated
from seer_jax.models.config import RopeConfig
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Random, Scorer, SinkWindow
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32)


def rows(decoded: int = 16) -> EvalRows:
    prompt = PassKeyPrompt(name="x", answer="12345", depth=0.1, tokens=TOKENS[1], answer_length=5)
    return EvalRows(TOKENS[:1], [prompt], decoded)


@pytest.mark.slow
def test_every_method_is_compared_at_every_level():
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


def test_methods_come_from_the_registry():
    names = [method.name for method in all_methods()]
    assert names[:3] == ["gate", "window", "random"] and names[-1] == "oracle"
    assert sorted(names) == sorted(name for name, kind in SCORERS.items() if kind.by_default)


def test_a_phase_without_a_gate_has_no_learned_method():
    level = SparsityLevel("budget", TokenBudget(64))
    got = [(s.phase, s.method) for s in compare(tiny_model(gates=False), rows(), [level], methods=(LearnedGate(),))]
    assert got == [(phase, None) for phase in Phase]


@pytest.mark.slow
def test_a_level_may_be_for_one_phase():
    level = SparsityLevel("budget", TokenBudget(64), (Phase.DECODE,))
    got = [(s.phase, s.method) for s in compare(tiny_model(gates=False), rows(), [level], methods=(SinkWindow(),))]
    assert got == [(Phase.PREFILL, None), (Phase.DECODE, None), (Phase.DECODE, "window")]


def test_a_level_makes_the_question_as_sparse_as_the_rest():
    assert SparsityLevel("x", TopK(0.1)).policy_of(Oracle()) == TopK(0.1, Oracle(), dense_last_rows=0)
    policy = SparsityLevel("x", TokenBudget(64, dense_layers=2)).policy_of(Oracle())
    assert policy == TokenBudget(64, Oracle(), dense_layers=2)


LEVELS = [
    ("topk:0.1", SparsityLevel("topk:0.1", TopK(0.1))),
    ("topk:0.124", SparsityLevel("topk:0.124", TopK(0.124))),
    ("topk:0.5:oracle", SparsityLevel("topk:0.5", TopK(0.5, Oracle()), methods=(Oracle(),))),
    ("topk:0.5:gate", SparsityLevel("topk:0.5", TopK(0.5), methods=(LearnedGate(),))),
    ("mass:0.9,dense_last_rows=2", SparsityLevel("mass:0.9,dense_last_rows=2", CumulativeMass(0.9), dense_last_rows=2)),
    ("mass:0.9,dense_last_rows=0", SparsityLevel("mass:0.9", CumulativeMass(0.9, dense_last_rows=0))),
    (
        "budget:64:random,seed=3",
        SparsityLevel("budget:64,seed=3", TokenBudget(64, Random(3)), methods=(Random(3),)),
    ),
    ("budget:64,dense_layers=1", SparsityLevel("budget:64,dense_layers=1", TokenBudget(64, dense_layers=1))),
]


@pytest.mark.parametrize(("text", "level"), LEVELS, ids=[text for text, _ in LEVELS])
def test_a_level_keeps_all_that_its_policy_says(text: str, level: SparsityLevel):
    """Its scorer and its dense rows too, which a comparison otherwise chooses."""
    assert parse_level(text) == level
    ran = level.policy_of((level.methods or (SinkWindow(),))[0])
    assert getattr(ran, "dense_last_rows", 0) == level.dense_last_rows


def test_names_tell_levels_apart():
    assert level_name(TopK(0.1, SinkWindow(), dense_last_rows=0)) == "topk:0.1"
    assert level_name(TopK(0.1, dense_layers=2)) == "topk:0.1,dense_layers=2"
    assert level_name(Dense()) == "dense"


METHODS = SinkWindow(), LearnedGate()


def planned(*texts: str, methods: tuple[Scorer, ...] = METHODS, gates: bool = True) -> list[Any]:
    levels = [parse_level(text) for text in texts]
    return plan_measurements(tiny_model(gates=gates), levels, methods=methods, phases=(Phase.DECODE,))


def test_a_policy_with_a_scorer_is_measured_with_it_alone_and_equal_ones_once():
    got = [
        (one.method, one.level)
        for one in planned("topk:0.5", "topk:0.50:window", "topk:0.5:oracle", "budget:64:random")
    ]
    assert got == [
        *[(None, "dense"), ("window", "topk:0.5"), ("gate", "topk:0.5")],
        *[("oracle", "topk:0.5"), ("random", "budget:64")],
    ]


NOTES = [
    (("topk:0.1", "topk:0.10"), True, ["topk:0.1 is named 2 times; it is measured once."]),
    (("topk:0.5", "topk:0.5:oracle"), True, []),
    (("topk:0.5", "topk:0.5:gate"), False, None),
    (
        ("topk:0.1", "topk:0.2", "topk:0.9", "budget:32", "budget:40"),
        True,
        [
            "decode: topk:0.1 and topk:0.2 choose equally many blocks at 96 tokens, 2 of 6 per row, so their scores are equal.",
            "decode: budget:32 and budget:40 choose equally many blocks at 96 tokens, 2 of 6 per row, so their scores are equal.",
        ],
    ),
    (
        ("topk:0.5", "budget:96"),
        True,
        ["decode: budget:96 keeps every block at 96 tokens, all 6, as dense attention does."],
    ),
]
# Levels that keep equally many blocks for the last tokens of a row, but not for the first ones.
AT_THE_END = [
    (Row(96), []),
    (
        Row(96, 80),
        [
            "decode: topk:0.5 and topk:0.6 choose equally many blocks at 96 tokens, 3 of 6 per row, so their scores are equal."
        ],
    ),
]


@pytest.mark.parametrize(("row", "expected"), AT_THE_END)
def test_only_tokens_whose_blocks_are_chosen_count(row: Row, expected: list[str]):
    levels = [parse_level("topk:0.5"), parse_level("topk:0.6")]
    assert equal_counts(tiny_model(), levels, [Phase.DECODE], rows={row}) == expected


@pytest.mark.parametrize(("texts", "gates", "expected"), NOTES, ids=[" ".join(texts) for texts, _, _ in NOTES])
def test_readers_are_told_what_a_table_would_hide(texts: tuple[str, ...], gates: bool, expected: list[str] | None):
    levels, phases = [parse_level(text) for text in texts], (Phase.DECODE,)
    plan = planned(*texts, gates=gates)
    if expected is None:
        with pytest.raises(ValueError, match="with the learned gate, but the model has no decode gate"):
            left_out(plan, levels, METHODS, phases)
        return
    notes = left_out(plan, levels, METHODS, phases) + repeated(levels)
    assert notes + equal_counts(tiny_model(), levels, phases, rows=[Row(96)]) == expected


def test_a_phase_that_lacks_the_gate_is_named():
    model = tiny_model()
    model.prefill_gate = None
    assert model.decode_gate is not None
    model.decode_gate.recommended = TokenBudget(64)
    assert recommendations(model) == ["The decode gate recommends budget:64."]
    levels = [parse_level("topk:0.5:gate")]
    notes = left_out(plan_measurements(model, levels), levels, all_methods(), tuple(Phase))
    assert notes == ["prefill: the model has no gate, so topk:0.5 is left out."]


def test_scores_that_are_there_are_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    level, model = parse_level("budget:32"), tiny_model()
    settings: dict[str, Any] = dict(methods=(SinkWindow(),), phases=(Phase.PREFILL,))
    scores = list(compare(model, rows(), [level], **settings))
    first, second = compare(model, rows(), [level], **settings, done=scores[:1])
    assert first == scores[0] and (second.windows, second.prompts) == (scores[1].windows, scores[1].prompts)
    monkeypatch.setattr(comparison, "score_prompts", None)
    assert list(compare(model, rows(), [level], **settings, done=scores)) == scores


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


SHORT = dataclasses.replace(LLAMA, max_position_embeddings=64, rope=RopeConfig(theta=1e4))


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
    (lambda: planned("topk:0.5", methods=(Unregistered(),)), "registered scorers.*got <.*Unregistered"),
    (lambda: EvalRows(TOKENS[0], []), r"windows must be integers \[n, T\]; got int32 \(96,\)"),
    (lambda: EvalRows(TOKENS * 0.5, []), r"windows must be integers \[n, T\]; got float64"),
    (lambda: EvalRows(TOKENS[:, :90], rows().prompts), r"have the 90 tokens of the windows; got one of shape \(96,\)"),
    (lambda: compare(tiny_model(), rows(), [], batch_size=0), "batch_size must be at least 1; got 0"),
    (lambda: compare(tiny_model(), rows(), [], workers=0), "workers must be at least 1; got 0"),
    (
        lambda: compare(tiny_model(SHORT), rows(), []),
        "must fit the model's context of 64 tokens; got 96.*beyond_context=True",
    ),
    (lambda: planned("budget:8"), "at least one block of 16 tokens; got 8"),
    (lambda: planned("topk:0.5,dense_layers=2"), "must leave a sparse layer: below 2"),
    (lambda: parse_level("dense,skip=0.1"), "with skip it is written threshold:0:window,skip=0.1"),
    (lambda: planned("topk:0.5,skip=0.1"), "A policy for decoding must have no skip.*--phases prefill"),
    (lambda: parse_level("dense"), "policies must rank blocks.*got dense. Dense attention is measured anyway"),
    (
        lambda: plan_measurements(tiny_model(), [SparsityLevel("x", TopK(0.1)), SparsityLevel("x", TopK(0.2))]),
        "a name of its own; got 'x' for topk:0.1.* and topk:0.2",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_method_for_one_phase_is_left_out_of_the_other():
    levels, model = [parse_level("topk:0.5:xattention"), parse_level("topk:0.5:quest")], tiny_model(gates=False)
    plan = plan_measurements(model, levels)
    assert [(one.phase, one.method) for one in plan] == [
        *[(Phase.PREFILL, None), (Phase.PREFILL, "xattention")],
        *[(Phase.DECODE, None), (Phase.DECODE, "quest")],
    ]
    assert left_out(plan, levels, all_methods(), tuple(Phase)) == [
        "prefill: quest has no scores for this phase, so it is left out.",
        "decode: xattention has no scores for this phase, so it is left out.",
    ]
    message = "topk:0.5 is to be measured with xattention, which cannot rank blocks at decode. Add the other phase, or"
    with pytest.raises(ValueError, match=message):
        left_out(plan_measurements(model, levels, phases=(Phase.DECODE,)), levels[:1], all_methods(), (Phase.DECODE,))

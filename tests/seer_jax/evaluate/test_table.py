"""Scores as estimates with standard errors, as tables and as JSON."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from seer_jax.calibrate import Calibration, HeldOut, Quantity, Report, Target, print_report
from seer_jax.evaluate import (
    Phase,
    PromptScore,
    Score,
    WindowScore,
    legend,
    passkey_difference,
    perplexity_over,
    score_from_json,
    score_line,
    score_to_json,
    table_rows,
    write_scores,
)
from seer_jax.evaluate.score import ESTIMATORS
from seer_jax.evaluate.statistics.blocks_needed import ABOVE, BELOW, BlocksNeeded
from seer_jax.evaluate.statistics.intervals import Estimate, Interval, interval_of_mean
from seer_jax.evaluate.table import losses, narrow_leads, print_blocks_needed, print_scores
from seer_jax.evaluate.tasks import table as tasks_table
from seer_jax.evaluate.tasks.base import TaskPhase
from seer_jax.evaluate.tasks.table import Figures, print_figures
from seer_jax.selection.rules import CumulativeMass, Threshold
from seer_jax.selection.scorers import SCORERS, SinkWindow


def score(phase: Phase, method: str | None, level: str, perplexities: list[float], found: list[int]) -> Score:
    """Of windows with these perplexities and prompts with these outcomes."""
    return Score(
        phase,
        method,
        level,
        tuple(WindowScore(math.log(p), 0.25) for p in perplexities),
        tuple(PromptScore(0.1 * (i + 1), bool(f), float(f), 0.35) for i, f in enumerate(found)),
        tokens=10,
        seconds=1.0,
    )


SCORES = [
    score(Phase.PREFILL, None, "dense", [4.0, 6.25], [1, 1, 1, 1]),
    score(Phase.PREFILL, "gate", "topk:0.1", [6.0, 6.0], [1, 1, 0, 0]),
    score(Phase.PREFILL, "window", "topk:0.1", [6.0, 6.0], [1, 0, 0, 0]),
    score(Phase.DECODE, None, "dense", [4.0, 4.0], []),
    score(Phase.DECODE, "gate", "topk:0.1", [4.5, 4.5], [1]),
    score(Phase.DECODE, "random", "topk:0.1", [9.0, 9.0], [1]),
    score(Phase.DECODE, "gate", "budget:64", [4.25, math.nan], [1]),
]


def test_every_estimate_has_the_standard_error_of_its_sample():
    of = SCORES[0].estimates
    assert of.keys() | {"over_dense", "passkey_worst", "blocks_needed"} == ESTIMATORS.keys()
    deviation = (math.log(6.25) - math.log(4)) / math.sqrt(2)  # sample deviation of two
    assert of["perplexity"] == pytest.approx((5, 5 * deviation / math.sqrt(2)))
    assert SCORES[1].estimates["passkey"] == pytest.approx((0.5, math.sqrt(0.5 * 0.5 / 3)))
    assert SCORES[1].estimates["kept"] == (0.25, 0)  # of the windows alone
    one = score(Phase.DECODE, None, "dense", [4.0], [])
    assert math.isnan(one.estimates["perplexity"].stderr) and math.isnan(one.passkey) and one.passkey_worst is None
    assert SCORES[1].passkey_by_depth[0.1].value == 1 and len(SCORES[1].passkey_by_depth) == 4
    assert SCORES[1].passkey_worst == (pytest.approx(0.3), SCORES[1].passkey_by_depth[SCORES[2].prompts[2].depth])


def test_differences_are_of_the_same_rows():
    """Windows that are hard for both scores do not make their difference uncertain."""
    easy_and_hard = score(Phase.PREFILL, "gate", "x", [2.0, 50.0, 10.0], [1, 0])
    worse = score(Phase.PREFILL, "window", "x", [2.2, 54.0, 11.0], [1, 0])
    value, low, high = perplexity_over(worse, easy_and_hard)
    logs = np.log([1.1, 1.08, 1.1])
    assert value == pytest.approx(np.exp(logs.mean()) - 1)
    reach = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # Student's quantile of 97.5%, 2 degrees of freedom
    assert (low, high) == pytest.approx((np.exp(logs.mean() - reach) - 1, np.exp(logs.mean() + reach) - 1))
    assert 0.06 < low < value < high < 0.13 and worse.estimates["perplexity"].stderr > 5
    assert passkey_difference(worse, easy_and_hard) == (0, 0, 0)
    with pytest.raises(ValueError, match="of the same windows to be compared; got 3 and 2 windows"):
        perplexity_over(worse, SCORES[0])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of few windows too, where twice the standard error would hold it too seldom."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        low, high = interval_of_mean((rng.normal(size=4) + 1).tolist())[1:]
        held.append(low <= 1 <= high)
    assert 0.935 < np.mean(held) < 0.965


def test_a_row_per_method_and_policy_and_a_column_per_figure():
    over = "+20.0% (-93.0% to +1944.3%)"
    assert table_rows(SCORES) == [
        ["phase", "method", "policy", "ppl", "over", "keys", "±", "worst", "read"],
        ["prefill", "dense", "-", "5.00", "-", "100%", "0%", "100%@0.1", "25.0%"],
        ["prefill", "learned gate", "topk:0.1", "6.00", over, "50%", "29%", "0%@0.3", "25.0%"],
        ["prefill", "sink+window", "topk:0.1", "6.00", over, "25%", "25%", "0%@0.2", "25.0%"],
        ["decode", "dense", "-", "4.00", "-", "-", "-", "-", "25.0%"],
        ["decode", "learned gate", "topk:0.1", "4.50", "+12.5% (+12.5% to +12.5%)", "100%", "-", "100%@0.1", "25.0%"],
        ["decode", "random", "topk:0.1", "9.00", "+125.0% (+125.0% to +125.0%)", "100%", "-", "100%@0.1", "25.0%"],
        ["decode", "learned gate", "budget:64", "-", "-", "100%", "-", "100%@0.1", "25.0%"],
    ]


def test_a_line_of_a_score():
    assert score_line(SCORES[1], SCORES[0]) == (
        "prefill learned gate, topk:0.1: perplexity 6.000, +20.0% (-93.0% to +1944.3%) over dense, pass keys 50% (worst 0%@0.3), "
        "blocks read 25.0% (1.0 s)"
    )
    assert score_line(SCORES[3], SCORES[3]) == "decode dense: perplexity 4.000, blocks read 25.0% (1.0 s)"


@pytest.mark.parametrize("policies", [1, 9])
@pytest.mark.parametrize("name", ["threshold:[{} x 8]", "threshold:0.00{}05,dense_layers=12,dense_last_rows=2"])
def test_tables_fit_a_terminal_of_80_characters(policies: int, name: str):
    gate = [score(Phase.PREFILL, "gate", name.format(i), [116.0 + i], [1, 0]) for i in range(policies)]
    out = io.StringIO()
    print_scores(Console(file=out, width=80), [score(Phase.PREFILL, None, "dense", [115.0], [1, 1]), *gate])
    table = out.getvalue().partition("\n\n")[0]
    assert "…" not in table and max(map(len, table.splitlines())) <= 80
    rows = [line.split() for line in table.splitlines()]
    assert [row for row in rows if "50%" in row and f"{115 + policies}.00" in row]
    assert name.format(0) in table or "last_rows=2" in table


def calibration_report(console: Console) -> None:
    policies = Threshold(np.full((2, 3), 0.1)), CumulativeMass(0.961234)
    rows = [HeldOut(LONG, policy, 1.0, 1.0, (-0.2, 0.1)) for policy in policies]
    made = Calibration(Phase.PREFILL, Target(Quantity.OVER, 0.01), policies[0], 1.0, 1.0, None, 64, {})
    print_report(console, Report(made, 18.3, tuple(rows)))


LONG = "a method whose name is long"
ESTIMATE, OVER = Estimate(-0.625, 0.125), Interval(-0.0062, -1.0, 19.4434)
PRINTED = {
    "calibration": (
        calibration_report,
        [" -4.88% (-85.9% to +539.8%)", "0.961"],
    ),
    "blocks needed": (
        lambda console: print_blocks_needed(
            console,
            [
                BlocksNeeded(
                    Phase.PREFILL, "long", f"{LONG},dense_last_rows=2", 0.01, 0.9, BELOW, ABOVE, (0.885, 0.986), 3
                )
            ],
        ),
        ["90.0% (below 88.5% to above 98.6%)"],
    ),
    "tasks": (
        lambda console: print_figures(
            console,
            [
                Figures(
                    LONG, LONG, f"{LONG},dense_last_rows=2", TaskPhase.BOTH, ESTIMATE, OVER, ESTIMATE, True, ESTIMATE
                )
            ],
        ),
        ["-62.5% 12.5% -0.62% (-100.0% to +1944.3%) -62.5% + -62.5%"],
    ),
}


@pytest.mark.parametrize("printed", PRINTED)
def test_figures_are_never_cut(printed: str, monkeypatch: pytest.MonkeyPatch):
    """Text folds in a terminal of 80 characters, whatever the names."""
    monkeypatch.setitem(SCORERS, "long", type("Long", (SinkWindow,), {"title": LONG}))
    monkeypatch.setattr(tasks_table, "legend", lambda lines: {})
    show, figures = PRINTED[printed]
    out = io.StringIO()
    show(Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert [figure for figure in figures if figure not in text] == []


def test_the_printed_table_explains_its_words():
    out = io.StringIO()
    print_scores(Console(file=out, width=120), SCORES)
    words = [
        "ppl",
        "over",
        "keys",
        "±",
        "worst",
        "read",
        "prefill",
        "decode",
        "dense",
        "learned gate",
        "sink+window",
        "random",
    ]
    assert list(legend(SCORES)) == words
    for word, meaning in legend(SCORES).items():
        assert f"{word}: {meaning}" in out.getvalue()
    assert legend(SCORES)["sink+window"] == SinkWindow.meaning
    assert "oracle" not in out.getvalue()
    without = [dataclasses.replace(score, prompts=()) for score in SCORES[:3]]
    print_scores(Console(file=(short := io.StringIO()), width=120), without)
    assert "keys" in out.getvalue() and not re.search("keys|±|worst", short.getvalue())


def test_json_holds_every_row_and_null_for_what_is_missing(tmp_path: Path):
    broken = score(Phase.DECODE, "random", "topk:0.5", [math.nan, math.inf], [0])
    write_scores(tmp_path / "a" / "scores.json", [*SCORES, broken], model="tiny")
    text = (tmp_path / "a" / "scores.json").read_text(encoding="utf-8")
    written = json.loads(text)
    assert "NaN" not in text and "Infinity" not in text
    assert [s["passkey"] for s in written["scores"]] == [1.0, 0.5, 0.25, None, 1.0, 1.0, 1.0, 0.0]
    assert [s["method"] for s in written["scores"]][:3] == [None, "gate", "window"]
    assert written["legend"] == legend(SCORES) and written["estimators"] == ESTIMATORS and written["model"] == "tiny"
    assert written["scores"][1]["passkey_by_depth"]["0.2"] == {"value": 1.0, "stderr": None}
    assert written["scores"][0]["over_dense"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert written["scores"][5]["over_dense"]["value"] == pytest.approx(1.25)
    assert written["scores"][1]["passkey_worst"] == {"depth": pytest.approx(0.3), "value": 0.0, "stderr": None}
    assert written["scores"][3]["passkey_worst"] is None and score_to_json(SCORES[1])["over_dense"] is None
    for one in SCORES[:-1]:
        values = score_to_json(one)
        assert score_from_json(json.loads(json.dumps(values))) == one
        assert {f"{name}_stderr" for name in one.estimates} < values.keys()
    with pytest.raises(ValueError, match=r"must have the fields that seer-jax eval writes.*KeyError: 'method'"):
        score_from_json({"phase": "prefill"})


def test_places_where_a_baseline_wins_are_listed():
    assert losses(SCORES) == [
        "prefill topk:0.1: sink+window has perplexity 6.000, ours 6.000: +0.00% (+0.00% to +0.00%)",
        "decode topk:0.1: random finds 100% of the pass keys, ours 100%",
    ]
    assert losses(SCORES, baselines=()) == []


def test_leads_that_may_be_chance_are_listed():
    assert narrow_leads(SCORES) == [
        "prefill topk:0.1: sink+window: share of pass keys below the gate's by +25.0% (-54.6% to +104.6%)"
    ]

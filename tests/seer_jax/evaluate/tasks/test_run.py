"""Tasks under policies: predictions are the model's, scores and differences are those of the samples, JSON gives them back."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from rich.console import Console

from seer_jax import generate, load_tokenizer
from seer_jax.evaluate import Phase
from seer_jax.evaluate.comparison import Measurement
from seer_jax.evaluate.levels import LevelPair, parse_levels
from seer_jax.evaluate.statistics.intervals import Interval
from seer_jax.evaluate.tasks import (
    Outcome,
    PromptEncoder,
    Sample,
    Task,
    TaskScore,
    TaskSettings,
    difference,
    plan_pairs,
    run_tasks,
    task_policies,
    write_task_scores,
)
from seer_jax.evaluate.tasks.base import TaskPhase
from seer_jax.evaluate.tasks.score import figures, score_from_json, score_to_json
from seer_jax.evaluate.tasks.table import cells, line_of, print_figures
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TopK
from seer_jax.selection.scorers import LearnedGate, SinkWindow
from tests.seer_jax.conftest import tiny_model


@dataclasses.dataclass(frozen=True)
class Exact(Task):
    name: str = "exact"
    new_tokens: int = 4

    def samples(self, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
        raise NotImplementedError

    def score(self, prediction: str, sample: Sample) -> float:
        return float(prediction == sample.answers[0])


PAIRS = [
    pair
    for text in ("topk:0.1+topk:0.1", "topk:0.1:oracle+budget:16")
    if isinstance(pair := parse_levels(text), LevelPair)
]


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_predictions_are_the_models():
    model = tiny_model()
    encoder = PromptEncoder(load_tokenizer("tiny-lm"))
    prompts = np.random.default_rng(0).integers(0, 64, (3, 40), np.int32)
    texts = [encoder.tokenizer.decode_known(row) for row in generate(model, prompts, max_new_tokens=4).rows()]
    answers = [texts[0], texts[1] + "?", texts[2]]
    samples = [Sample(row, (answer,), depth=0.5) for row, answer in zip(prompts, answers, strict=True)]
    sparse = TopK(0.1, SinkWindow(), dense_last_rows=0)
    measured = [Measurement(phase, method, "topk:0.1", sparse) for phase in Phase for method in ("window",)]
    policies = task_policies([Measurement(Phase.PREFILL, None, "dense", Dense()), *measured])
    assert [(p.phase, p.prefill, p.decode) for p in policies] == [
        (None, Dense(), Dense()),
        (TaskPhase.PREFILL, sparse, Dense()),
        (TaskPhase.DECODE, Dense(), sparse),
    ]
    pairs = plan_pairs(model, PAIRS, methods=(LearnedGate(), SinkWindow()))
    assert [(p.phase, p.method, p.level) for p in pairs] == [
        ("both", "gate", "topk:0.1+topk:0.1"),
        ("both", "window", "topk:0.1+topk:0.1"),
        ("both", "oracle+gate", "topk:0.1+budget:16"),
        ("both", "oracle+window", "topk:0.1+budget:16"),
    ]
    policies = [*policies, pairs[1]]
    done = {("exact", *p) for p in [(TaskPhase.PREFILL, "window", "topk:0.1")]}
    dense, decode, both = run_tasks(model, encoder, [(Exact(), samples)], policies, batch_size=2, done=done)
    assert [o.prediction for o in dense.outcomes] == texts and [o.score for o in dense.outcomes] == [1, 0, 1]
    assert dense.kept.value == 1 and dense.score.value == pytest.approx(2 / 3) and dense.phase is None
    assert decode.phase is TaskPhase.DECODE and decode.kept.value < 1 and decode.policy["rule"] == "topk"
    assert both.kept_decode == decode.kept and both.kept.value < 1 and decode.kept_decode is None
    assert both.policy == {"prefill": decode.policy, "decode": decode.policy}
    for one in (decode, both):
        assert score_from_json(json.loads(json.dumps(score_to_json(one)))) == one
    (line,) = figures([both])
    assert line_of(line).startswith("exact both sink+window, topk:0.1+topk:0.1: ")
    assert cells(line)[-1] == f"{both.kept.value:.1%} + {decode.kept.value:.1%}"


def score(task: str, method: str | None, *values: float, kept: float = 1.0, is_share: bool = True) -> TaskScore:
    phase, level = (None, "dense") if method is None else (TaskPhase.PREFILL, "topk:0.1")
    outcomes = tuple(Outcome(value, kept, "text", ("a",), None) for value in values)
    return TaskScore(task, phase, method, level, outcomes, 1.0, is_share=is_share)


SCORES = [
    score("a", None, 1, 1, 0, 1),
    score("a", "window", 1, 0, 0, 0, kept=0.2),
    score("b", None, 1, 1),
    score("b", "window", 0, 1, kept=0.4),
    score("ppl", None, 7.5, is_share=False),
    score("ppl", "window", 9.0, kept=math.nan, is_share=False),
]


def test_differences_are_paired_and_means_are_over_tasks():
    # 0, -1, 0, -1: mean -1/2, sample deviation sqrt(1/3), over sqrt(4); Student's quantile for 3 degrees of freedom.
    reach = 3.18245 * math.sqrt(1 / 3) / 2
    assert difference((SCORES[1], SCORES[0])) == pytest.approx(Interval(-0.5, -0.5 - reach, -0.5 + reach), rel=1e-5)
    with pytest.raises(ValueError, match="argument"):
        difference((SCORES[1], SCORES[2]))
    lines = figures(SCORES)
    assert [line.task for line in lines] == ["a", "a", "b", "b", "ppl", "ppl", "mean of 2 tasks", "mean of 2 tasks"]
    mean = lines[-1]
    assert mean.score.value == pytest.approx((0.25 + 0.5) / 2) and mean.over_dense is not None
    # Squared errors 1/12 (3 degrees of freedom) and 1/4 (1): (1/3)^2 / (1/432 + 1/16) = 1.7143 degrees by Welch and Satterthwaite.
    reach = float(scipy.special.stdtrit(1.714286, 0.975)) * math.sqrt(1 / 3) / 2
    assert mean.over_dense == pytest.approx(Interval(-0.5, -0.5 - reach, -0.5 + reach), rel=1e-5)
    assert figures(SCORES[:2])[-1].task == "a"  # no mean over one task


def test_the_table():
    shown = [cells(line) for line in figures(SCORES)]
    assert shown[0] == ["-", "dense", "-", "75.0%", "25.0%", "-", "100.0%"]
    over = "-50.0% (-141.9% to +41.9%)"
    assert shown[1] == ["prefill", "sink+window", "topk:0.1", "25.0%", "25.0%", over, "20.0%"]
    assert shown[5] == ["prefill", "sink+window", "topk:0.1", "9.000", "-", "+1.500", "-"]
    assert line_of(figures(SCORES)[3]) == (
        "b prefill sink+window, topk:0.1: 50.0% ± 50.0%, over dense -50.0% (-685.3% to +585.3%), blocks read 40.0%"
    )
    console = Console(width=120, file=(out := io.StringIO()))
    print_figures(console, figures(SCORES))
    text = out.getvalue()
    assert text.count("topk:0.1") == 4 and "mean of 2 tasks" in text and "over dense: score less" in text


def test_the_file(tmp_path: Path):
    write_task_scores(tmp_path / "tasks.json", SCORES, complete=True)
    values = json.loads((tmp_path / "tasks.json").read_text())
    assert values["complete"] and [s["task"] for s in values["scores"]] == ["a", "a", "b", "b", "ppl", "ppl"]
    assert values["scores"][1]["over_dense"]["value"] == -0.5 and values["scores"][0]["over_dense"] is None
    assert values["scores"][5]["kept"] is None and values["means"][1]["score"] == pytest.approx(0.375)
    again = [score_from_json(value) for value in values["scores"]]
    assert again[:5] == SCORES[:5] and math.isnan(again[5].kept.value)


@pytest.mark.parametrize("damage", [{"samples": None}, {"phase": "neither"}, {"policy": 3}, {"task": None}])
def test_a_damaged_score_is_refused(damage: dict[str, object]):
    with pytest.raises(ValueError, match="A score of a task must have the fields that seer-jax eval writes"):
        score_from_json(score_to_json(SCORES[0]) | damage)

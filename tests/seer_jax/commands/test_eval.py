"""`seer-jax eval`: which levels it measures, and a whole run on a tiny model."""

import json
from pathlib import Path

import pytest

from seer_jax import from_pretrained
from seer_jax.commands import main as cli
from seer_jax.commands.eval import EvalConfig
from seer_jax.evaluate import Phase
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TokenBudget, TopK

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
def test_levels_are_densities_and_what_the_gates_recommend(saved: Path):
    model = from_pretrained(saved / "base", [saved / "prefill", saved / "decode"], abstract=True)
    both = tuple(Phase)
    levels = [(level.name, level.phases) for level in EvalConfig().levels(model)]
    # The prefill gate recommends 40%, which is measured anyway.
    assert levels == [("10%", both), ("20%", both), ("40%", both), ("budget:32", (Phase.DECODE,))]
    assert model.prefill_gate is not None
    model.prefill_gate.recommended = TopK(0.3)
    assert [level.name for level in EvalConfig().levels(model)][3:] == ["topk:0.3", "budget:32"]
    named = EvalConfig(policies=(TopK(0.5), TokenBudget(64, dense_layers=1)))
    assert [(level.name, level.phases) for level in named.levels(model)] == [
        ("50%", both),
        ("budget:64,dense_layers=1", both),
    ]


def test_a_run_prints_and_writes_its_scores(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["eval", "--model", str(saved / "base"), "--gates", str(saved / "decode"), "--methods", "gate", "window"]
    words += ["--phases", "decode", "--policies", "budget:64", "--length", "256", "--windows", "1", "--passkeys", "1"]
    assert cli.main([*words, "--decoded", "8", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The decode gate recommends budget:32." in out
    assert "learned gate" in out and "sink+window" in out and "oracle" not in out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [(s["method"], s["level"]) for s in written["scores"]] == [
        *((None, "dense"), ("gate", "budget:64"), ("window", "budget:64")),
    ]


BAD = [
    (dict(length=0), "length must be at least 1; got 0"),
    (dict(passkeys=-1), "passkeys must be at least 0; got -1"),
    (dict(policies=(Dense(),)), "policies must rank blocks.*got dense"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)

"""The demo, on the bundled model at a size of seconds: every stage runs, shows how far it is, and every file is there."""

import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from seer_jax.commands import demo as command
from seer_jax.commands.demo import DemoConfig, demo
from seer_jax.commands.demo.levels import CALIBRATED, at_equal_shares, gains, level_at
from seer_jax.commands.stages import Stages, StepClock
from seer_jax.convert import load_gates
from seer_jax.evaluate import Phase, Score, SparsityLevel, WindowScore
from seer_jax.evaluate.table import losses
from seer_jax.gates.kinds import GateKind
from seer_jax.selection.rules import Threshold
from seer_jax.selection.scorers import LearnedGate
from seer_jax.train import DistillConfig

pytestmark = pytest.mark.usefixtures("compile_quickly")


ROWS = [
    (None, "dense"),
    ("gate", "60% calibrated"),
    ("gate", "60% one threshold"),
    ("window", "60% top-k"),
    ("random", "60% top-k"),
    ("oracle", "60% calibrated"),
]


@pytest.mark.slow
def test_the_demo_runs_and_writes_its_files(tmp_path: Path):
    pytest.importorskip("matplotlib")
    out = io.StringIO()
    config = DemoConfig(
        output=tmp_path,
        densities=(0.6,),
        length=512,
        steps=2,
        windows=1,
        calibration_windows=1,
        passkeys=1,
        decoded=16,
        new_tokens=4,
    )
    scores = demo(config, console=Console(file=out, width=120))
    assert [(s.method, s.level) for s in scores if s.phase is Phase.PREFILL] == ROWS
    assert [(s.method, s.level) for s in scores if s.phase is Phase.DECODE] == ROWS
    assert all(s.perplexity > 1 and 0 <= s.passkey <= 1 and 0 < s.kept <= 1 for s in scores)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert len(written["scores"]) == len(scores)
    assert written["config"]["steps"] == 2
    facts = {"command", "versions", "device", "estimators", "not_beaten", "narrow_leads", "gains", "texts"}
    assert facts <= written.keys() and len(written["gains"]) == 2
    assert (tmp_path / "block_maps.png").read_bytes().startswith(b"\x89PNG")
    gates = [load_gates(tmp_path / f"{phase}_gate") for phase in Phase]
    assert [gate.config.block_size for gate in gates] == [config.tokens_per_block] * 2
    recommended: list[Any] = [gate.recommended for gate in gates]
    assert [np.shape(policy.threshold) for policy in recommended] == [(8, 8), (8, 2)]
    for words in ("learned gate", "sink+window", "oracle", "perplexity: how many", "continued greedily", "Took"):
        assert words in out.getvalue()


@pytest.mark.slow
def test_the_bundled_gates_need_no_training(tmp_path: Path):
    out = io.StringIO()
    sizes: dict[str, Any] = dict(length=1024, windows=1, calibration_windows=1, passkeys=1, decoded=32, new_tokens=4)
    config = DemoConfig(output=tmp_path, bundled_gates=True, densities=(0.4,), **sizes)
    scores = demo(config, console=Console(file=out, width=120))
    of = {s.key: s for s in scores}
    gate, window = of[Phase.DECODE, "gate", "40% calibrated"], of[Phase.DECODE, "window", "40% top-k"]
    assert gate.passkey == 1 > window.passkey
    assert gate.kept == pytest.approx(window.kept, abs=0.03)
    assert "Distilling" not in out.getvalue() and "--gates tiny-lm" in out.getvalue()
    assert not (tmp_path / "prefill_gate").exists()


def levels_at(density: float) -> list[SparsityLevel]:
    """The calibrated gate's alone."""
    policy = Threshold(0.1, dense_last_rows=0)
    return [SparsityLevel(level_at(density, CALIBRATED), policy, (phase,), (LearnedGate(),)) for phase in Phase]


@pytest.mark.parametrize("kind", GateKind)
def test_both_kinds_of_gates_are_distilled(kind: GateKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[DistillConfig] = []

    def distill(config: DistillConfig, **settings: Any) -> None:
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "distill", distill)
    sizes: dict[str, Any] = dict(densities=(0.6,), length=512, windows=1, passkeys=1, decoded=16)
    with pytest.raises(KeyboardInterrupt):
        demo(DemoConfig(output=tmp_path, kind=kind, **sizes), console=Console(file=io.StringIO()))
    (config,) = asked
    finer = config.prefill.finer_than_release(), config.decode.finer_than_release()
    assert all(finer) if kind is GateKind.FINE else not any(finer)
    assert config.target == ("mass" if kind is GateKind.FINE else "max")
    assert config.prefill.block_size == config.decode.block_size == 32


def test_an_interrupted_demo_leaves_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def compare(model: Any, rows: Any, levels: Any, **settings: Any) -> Iterator[Score]:
        yield Score(Phase.PREFILL, None, "dense", (WindowScore(1.0, 1.0),), (), 511, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", compare)
    monkeypatch.setattr(command, "calibrated_levels", lambda *_: levels_at(0.5))
    out = io.StringIO()
    sizes: dict[str, Any] = dict(length=512, windows=1, passkeys=1, decoded=16)
    config = DemoConfig(output=tmp_path, bundled_gates=True, densities=(0.5,), **sizes)
    with pytest.raises(KeyboardInterrupt) as stop:
        demo(config, console=Console(file=out, width=200))
    assert stop.value.__notes__ == [f"Kept so far: {tmp_path / 'scores.json'}."]
    (score,) = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert score["perplexity"] == pytest.approx(math.e) and score["perplexity_stderr"] is None


def score(method: str, level: str, losses: Sequence[float], phase: Phase = Phase.DECODE) -> Score:
    return Score(phase, method, level, tuple(WindowScore(loss, 0.2) for loss in losses), (), 511, 1.0)


COMPARED = [
    score("gate", "20% calibrated", [1.0, 1.1]),
    score("gate", "20% one threshold", [1.1, 1.2]),
    score("window", "20% top-k", [1.3, 1.4]),
    score("random", "20% top-k", [0.9, 1.0]),
    score("oracle", "20% calibrated", [0.5, 0.6]),
    score("gate", "40% calibrated", [0.5, 0.6]),
]


def test_the_calibrated_gate_is_held_against_baselines_of_the_same_share():
    alike = at_equal_shares(COMPARED)
    shares = [(one.method, one.level) for one in alike]
    assert shares == [(m, "20% of the blocks") for m in ("gate", "window", "random")] + [("gate", "40% of the blocks")]
    (line,) = losses(alike)
    assert line.startswith("decode 20% of the blocks: random has perplexity 2.586, ours 2.858")


def test_what_calibration_gains_is_told_share_by_share():
    line = (
        "decode 20%: perplexity -9.52% (-9.52% to -9.52%) over one threshold's, 20.0% of the blocks read against 20.0%"
    )
    assert gains(COMPARED) == [line]
    single = [dataclasses.replace(one, windows=one.windows[:1]) for one in COMPARED]
    assert gains(single) == [line.replace(" (-9.52% to -9.52%)", "")]


BAD = [
    (dict(bundled_gates=True, block_size=32), "must be 64 with the bundled gates; got 32. Leave it out"),
    (dict(bundled_gates=True, length=2080), "multiple of block_size = 64.*got 2080"),
    (dict(densities=()), r"at least one share.*got none"),
    (dict(densities=(0.0,)), r"\(0, 1\]; got 0.0"),
    (dict(densities=(0.2, 0.05)), r"densities must be at least 0.062 at 2048 tokens.*; got 0.05. Raise it"),
    (dict(calibration_windows=0), "calibration_windows must be at least 1; got 0"),
    (dict(length=100), "length must be a multiple of block_size = 32.*got 100"),
    (dict(windows=0), "windows must be at least 1; got 0"),
    (dict(steps=1), "steps must be at least 2; got 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**change)


def test_stages_tell_the_time_that_is_left():
    now = iter([0.0, 30.0, 60.0, 90.0])
    clock = StepClock(3, now=lambda: next(now))
    assert clock.left == ""
    clock.step()
    assert clock.left == "about 1 min 0 s left"
    clock.step()
    assert clock.left == "about 30 s left"
    clock.step()
    assert clock.left == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_each_step_has_its_line_where_it_is_a_result(terminal: bool):
    out = io.StringIO()
    stages = Stages(Console(file=out, width=80, force_terminal=terminal))
    with stages.stage("Measuring", 2, every_step=True) as advance:
        advance("one [bold]")
        advance("two")
    text = out.getvalue()
    assert "one [bold]" in text and "two" in text and ("2/2" if terminal else "1/2 (about 0 s left)") in text
    with stages.stage("Quick", 2) as advance:
        advance("unseen")
    assert terminal or "unseen" not in out.getvalue()


def test_a_bar_shows_steps_and_time_left_on_80_columns():
    out = io.StringIO()
    stages = Stages(Console(file=out, width=80, force_terminal=True, no_color=True))
    with stages.stage("Comparing ways to choose blocks", 26) as advance:
        advance("prefill learned gate, topk:0.1: " + "a long word " * 20)
        time.sleep(0.3)  # for the bar to be drawn
    frames = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out.getvalue()).splitlines() if "1/26" in line]
    assert frames and all("Comparing ways to choose blocks" in line and "left" in line for line in frames)
    assert max(len(line.rstrip()) for line in frames) <= 80

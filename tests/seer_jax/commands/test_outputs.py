"""Outputs of every command are checked before its work, and what is missing for one of several leaves only that out."""

import builtins
import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.commands import demo
from seer_jax.commands import main as cli
from seer_jax.commands.stages import Stages, StepClock

GATE = str(tiny_lm.gates()["prefill"])
# A command, what begins its work, and its outputs.
COMMANDS = [
    (["demo"], "seer_jax.commands.demo:from_pretrained", ["--output"]),
    (["eval"], "seer_jax.commands.eval:from_pretrained", ["--output"]),
    (["generate", "--prompt", "x"], "seer_jax.commands.generate:from_pretrained", ["--report"]),
    (["bench", "prefill"], "seer_jax.bench.prefill:measure_prefill", ["--output", "--plot"]),
    (["bench", "decode"], "seer_jax.bench.decode:measure_decode", ["--output", "--plot"]),
    (["bench", "ground-truth"], "seer_jax.bench.ground_truth:measure_ground_truth", ["--output", "--plot"]),
    (["bench", "train"], "seer_jax.bench.training:measure_training", ["--output", "--plot"]),
    (["convert", "--gates", GATE], "seer_jax.commands.convert:load_gates", ["--output"]),
    (["train", "--model", "tiny-lm"], "seer_jax.train.api:load_dataset", ["--output"]),
]
CASES = [(words, work, option) for words, work, options in COMMANDS for option in options]


def fail(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("place", ["/proc/x.png", "{file}/x.png"])
@pytest.mark.parametrize(("words", "work", "option"), CASES, ids=[f"{' '.join(w[:2])} {o}" for w, _, o in CASES])
def test_an_output_that_can_not_be_written_is_refused_before_the_work(
    words: list[str],
    work: str,
    option: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    module, _, name = work.partition(":")
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    assert cli.main([*words, option, place]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and place in error and "must" in error, error

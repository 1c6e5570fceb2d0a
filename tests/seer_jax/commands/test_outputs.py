"""Outputs of every command are checked before its work, and what is missing for one of several leaves only that out."""

import builtins
import importlib
import inspect
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.commands import demo
from seer_jax.commands import main as cli
from seer_jax.commands.stages import Stages, StepClock

BASE, GATE = str(tiny_lm.path()), str(tiny_lm.gates()["prefill"])
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
    (["train", "--model", BASE, "--data.paths", BASE], "seer_jax.train.api:_load_model", ["--output"]),
]
CASES = [(words, work, option) for words, work, options in COMMANDS for option in options]


def fail(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("the work has begun")


def fail_when_asked(*arguments: Any, **settings: Any) -> Iterator[Any]:
    yield fail()


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
    home = importlib.import_module(module)
    lazily = inspect.isgeneratorfunction(inspect.unwrap(getattr(home, name)))
    monkeypatch.setattr(home, name, fail_when_asked if lazily else fail)
    assert cli.main([*words, option, place]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and place in error and " must " in error and option in error, error


def test_without_matplotlib_the_demo_leaves_the_plot_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    find, out = builtins.__import__, io.StringIO()

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(demo, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.demo(demo.DemoConfig(output=tmp_path), console=Console(file=out, width=200))
    assert "it is not installed. Run pip install matplotlib. block_maps.png is left out." in out.getvalue()
    assert "Interrupted. Kept so far: nothing." in capsys.readouterr().err


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

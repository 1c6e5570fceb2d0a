"""`seer-jax eval --tasks`: a whole run on a tiny model, its file, and that an interrupted one goes on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seer_jax.commands import main as cli
from seer_jax.commands.eval import EvalConfig, evaluate
from seer_jax.commands.eval import tasks as command

pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    """Of a command with two tasks under two policies."""
    rows = [dict(dataset="hotpotqa", context="word " * 900, input="Who?", answers=["Ann"]) for _ in range(2)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = ["--model", str(saved / "base"), "--gates", str(saved / "decode")]
    asked = ["--tasks", "qa_1hop", f"longbench:{tmp_path / 'long.jsonl'}", "--length", "512", "--samples", "3"]
    sparse = ["--phases", "decode", "--policies", "budget:64", "--methods", "window"]
    return ["eval", *models, *asked, *sparse, "--output", str(tmp_path / "out")]


def written(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "tasks.json").read_text(encoding="utf-8"))


def interrupted(*arguments: Any, **settings: Any) -> Iterator[Any]:
    yield next(run_tasks(*arguments, **settings))
    raise KeyboardInterrupt


run_tasks = command.run_tasks


@pytest.mark.slow
def test_a_run_is_shown_kept_and_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(command, "run_tasks", interrupted)
        assert cli.main(words) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seer-jax eval: interrupted. 1 of 4 scores are kept in")
    first = written(tmp_path)
    assert [s["task"] for s in first["scores"]] == ["qa_1hop"] and not first["complete"]

    assert cli.main([*words, "--length", "576"]) == 1
    assert "settings.length was 512, now 576" in capsys.readouterr().err

    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "longbench:hotpotqa has 2 samples; 3 were asked for." in out and "1 of 4 scores are in" in out
    assert (
        "Measuring: 3/3" in out
        and "longbench:hotpotqa decode sink+window, budget:64: 0.0% ± 0.0%, over dense +0.00% (" in out
    )
    assert "mean of 2 tasks" in out
    report = written(tmp_path)
    kinds = [(s["task"], s["phase"], s["method"]) for s in report["scores"]]
    tasks = ["qa_1hop", "longbench:hotpotqa"]
    assert kinds == [one for task in tasks for one in ((task, None, None), (task, "decode", "window"))]
    assert report["complete"] and report["scores"][0] == first["scores"][0] and len(report["files"]) == 1
    assert [len(s["samples"]) for s in report["scores"]] == [3, 3, 2, 2]
    assert all(s["kept"] == 1 for s in report["scores"][::2]) and all(s["kept"] < 1 for s in report["scores"][1::2])

    # The same command, and the settings from the file, measure nothing anew.
    monkeypatch.setattr(command, "run_tasks", None)
    assert cli.main(words) == 0
    command.evaluate_tasks(EvalConfig.from_json(report["config"]))
    assert capsys.readouterr().out.count("4 of 4 scores are in") == 2 and written(tmp_path) == report

    # Other methods join them: dense attention is there.
    monkeypatch.setattr(command, "run_tasks", lambda *_, **__: iter(()))
    assert cli.main([*words, "--methods", "random"]) == 0
    assert "2 of 4 scores are in" in capsys.readouterr().out and written(tmp_path) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "hellaswagg"], r"--tasks must be known; got 'hellaswagg'"),
        (
            ["--tasks", "vt", "--length", "100"],
            "vt: A prompt must have room for its text and question: .* Raise --length.",
        ),
        (["--samples", "0"], "--samples must be at least 1; got 0."),
        (["--tasks", "niah_single_2", "--text", "absent.txt"], "absent.txt"),
        (["--passkeys", "2"], "--passkeys must be left out with tasks, which .*; got 2"),
        (
            ["--policies", "topk:0.1", "--methods", "xattention", "--phases", "decode"],
            "topk:0.1 .*(decode|phase)",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], message: str
):
    assert cli.main([*words, *change]) != 0
    error = capsys.readouterr().err
    assert error.startswith("seer-jax eval: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_perplexity_has_no_tasks():
    with pytest.raises(
        ValueError, match=r"tasks must be empty for perplexity and pass keys; got vt\. Call evaluate_tasks"
    ):
        evaluate(EvalConfig(tasks=("vt",)))

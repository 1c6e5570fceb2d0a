"""`seer-jax eval`: which levels it measures, a whole run on a tiny model, and that nothing of it is lost."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from seer_jax import from_pretrained
from seer_jax.commands import eval as command
from seer_jax.commands import main as cli
from seer_jax.commands.eval import EvalConfig, evaluate
from seer_jax.evaluate import Phase, Score
from seer_jax.evaluate.score import ESTIMATORS
from seer_jax.inference import memory
from seer_jax.inference.memory import DeviceMemory
from seer_jax.selection.notation import write_policy_file
from seer_jax.selection.rules import TopK
from seer_jax.selection.scorers import LearnedGate, SinkWindow

# Plans are made of shapes, which stand for arrays.
pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")

SMALL = ["--phases", "decode", "--length", "256", "--windows", "2", "--passkeys", "2", "--decoded", "8"]


def test_levels_are_densities_and_what_the_gates_recommend(saved: Path):
    model = from_pretrained(saved / "base", [saved / "prefill", saved / "decode"], abstract=True)
    both = tuple(Phase)
    levels = [(level.name, level.phases) for level in EvalConfig().levels(model)]
    # The prefill gate recommends topk:0.4, which is measured anyway.
    densities = ["topk:0.1", "topk:0.2", "topk:0.4"]
    assert levels == [*((name, both) for name in densities), ("budget:32", (Phase.DECODE,))]
    assert model.prefill_gate is not None
    model.prefill_gate.recommended = TopK(0.3)
    assert [level.name for level in EvalConfig().levels(model)][3:] == ["topk:0.3", "budget:32"]
    named = EvalConfig(policies=("topk:0.5:window", "budget:64,dense_layers=1"))
    assert [(level.name, level.methods) for level in named.levels(model)] == [
        ("topk:0.5", (SinkWindow(),)),
        ("budget:64,dense_layers=1", None),
    ]


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    """Of a command with four scores."""
    models = ["--model", str(saved / "base"), "--gates", str(saved / "decode")]
    (tmp_path / "text.txt").write_text("x = 1\n" * 500)
    models += ["--text", str(tmp_path / "text.txt")]
    asked = ["--methods", "gate", "window", "--policies", "budget:64", "budget:64:oracle"]
    return ["eval", *models, *asked, *SMALL, "--output", str(tmp_path / "out")]


KEYS = [(None, "dense"), ("gate", "budget:64"), ("window", "budget:64"), ("oracle", "budget:64")]


def written(path: Path) -> dict[str, Any]:
    return json.loads((path / "out" / "scores.json").read_text(encoding="utf-8"))


def without_time(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in score.items() if name != "seconds"} for score in scores]


def test_a_run_is_shown_kept_and_can_be_repeated(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "The decode gate recommends budget:32." in out
    assert "Measuring: 2/4 (about" in out and "decode learned gate, budget:64: perplexity" in out
    assert "sink+window" in out and "random" not in out.replace("as random ones", "")
    report = written(tmp_path)
    assert [(s["method"], s["level"]) for s in report["scores"]] == KEYS and report["complete"]
    facts = ["command", "device", "platform", "versions", "config", "dtype", "model", "gates", "text"]
    assert {*facts, "block_sizes", "started", "updated", "estimators", "legend"} <= report.keys()
    assert report["text"]["bytes"] > 0 and len(report["text"]["sha256"]) == 64
    for score in report["scores"]:
        figures = ("perplexity", "passkey", "passkey_tokens", "kept")
        assert {*ESTIMATORS, *(f"{name}_stderr" for name in figures), "passkey_by_depth"} - {
            "blocks_needed"
        } <= score.keys()
        assert score["tokens"] == 2 * 255 and score["over_dense"].keys() == {"value", "low", "high"}
        assert len(score["windows"]) == len(score["prompts"]) == 2

    # Next month, from the file alone.
    changes = {"output": str(tmp_path / "again" / "out")}
    evaluate(EvalConfig.from_json(report["config"] | changes))
    again = written(tmp_path / "again")
    assert without_time(again["scores"]) == without_time(report["scores"])
    assert again["identity"] == report["identity"]

    # The same command measures nothing anew.
    monkeypatch.setattr(command, "compare", None)
    capsys.readouterr()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "4 of 4 scores are in" in out and "budget:64" in out and written(tmp_path) == report


def stop_after(count: int, error: BaseException) -> Callable[..., Iterator[Score]]:
    """`compare`, interrupted."""

    def interrupted(*arguments: Any, **settings: Any) -> Iterator[Score]:
        for number, score in enumerate(compare(*arguments, **settings)):
            if number == count:
                raise error
            yield score

    compare = command.compare
    return interrupted


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(command, "compare", stop_after(2, KeyboardInterrupt()))
        assert cli.main(words) == 130
    (line,) = capsys.readouterr().err.splitlines()
    kept = f"2 of 4 scores are kept in {tmp_path / 'out' / 'scores.json'}; the same command goes on from there."
    assert line == f"seer-jax eval: interrupted. {kept}"
    first = written(tmp_path)
    assert len(first["scores"]) == 2 and not first["complete"]

    for changed, message in (
        (["--length", "320"], "settings.length was 256, now 320"),
        (["--dtype", "bfloat16"], 'dtype was "float32", now "bfloat16"'),
        (["--gates", "tiny-lm", "--model", "tiny-lm"], 'model was "'),
    ):
        with pytest.raises(ValueError, match=f"scores of another evaluation.*{message}.*or pass force=True"):
            cli.main([*words, *changed, "--traceback"])
    capsys.readouterr()

    assert cli.main(words) == 0
    assert "2 of 4 scores are in" in capsys.readouterr().out
    whole = written(tmp_path)
    assert whole["scores"][:2] == first["scores"] and whole["started"] == first["started"]
    assert [(s["method"], s["level"]) for s in whole["scores"]] == KEYS and whole["complete"]

    # Other policies, methods and phases join them.
    asked = ["--policies", "budget:32", f"{tmp_path / 'mine.json'}", "--methods", "window"]
    write_policy_file(tmp_path / "mine.json", TopK(0.5, SinkWindow()))
    assert cli.main([*words, *asked]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 scores (and 3 besides them) are in" in out and "Measuring: 2/2" in out
    assert all(f" {level} " in out for level in ("budget:32", "mine.json", "budget:64"))
    more = written(tmp_path)
    assert more["scores"][:4] == whole["scores"] and more["complete"] and more["started"] == whole["started"]
    assert [(s["method"], s["level"]) for s in more["scores"][4:]] == [("window", "budget:32"), ("window", "mine.json")]
    assert more["config"]["policies"] == asked[1:3]
    assert [run["config"] for run in more["earlier"]] == [whole["config"]]

    # A policy file that has changed is another policy.
    write_policy_file(tmp_path / "mine.json", TopK(0.6, SinkWindow()))
    assert cli.main([*words, *asked]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "decode window at mine.json has another density. Give the policy another name" in error
    )
    assert written(tmp_path) == more


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"scores": []}', '{"identity": {}, "started": "", "scores": [{}]}']
)
def test_other_files_are_not_overwritten(words: list[str], tmp_path: Path, content: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores.json.*force=True to start over"):
        cli.main([*words, "--traceback"])
    assert (tmp_path / "out" / "scores.json").read_text() == content


def test_memory_that_does_not_suffice_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")
    monkeypatch.setattr(command, "compare", stop_after(1, error))
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "allocation of 123 bytes. Lower --length" in said and "--batch-size" in said


@pytest.mark.parametrize(
    ("phases", "mesh", "needs"),
    [
        (tuple(Phase), None, r"needs .*weights 0.030, caches of 2 prompts 0\.\d*[1-9]"),
        ((Phase.PREFILL,), None, r"needs 0.030 GiB \(weights 0.030, caches of 0 prompts 0.000"),
        ((Phase.PREFILL,), "tensor=2", r"each of 2 devices needs 0.015 GiB \(weights 0.015, caches of 0 prompts 0.000"),
    ],
)
def test_weights_and_caches_must_fit_the_device(
    phases: tuple[Phase, ...], mesh: str | None, needs: str, monkeypatch: pytest.MonkeyPatch
):
    config = EvalConfig(phases=phases, length=256, windows=2, passkeys=2, decoded=16, mesh=mesh)
    monkeypatch.setattr(memory, "available_memory", lambda model: DeviceMemory(limit=2**24, in_use=2**23))
    with pytest.raises(
        MemoryError, match=rf"must fit in device memory: {needs}.*\), 0.008 GiB available. Lower `length`"
    ):
        evaluate(config)


class Measured(Exception):
    """Raised in place of the work."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: Any, **settings: Any) -> None:
        raise Measured

    monkeypatch.setattr(command, "_measure", work)


SETTINGS = [
    (dict(length=0), "length must be at least 1; got 0"),
    (dict(windows=0), "windows must be at least 1; got 0"),
    (dict(passkeys=-1), "passkeys must be at least 0; got -1"),
    (dict(decoded=1), "decoded must be at least 2 and less than length = 4096; got 1"),
    (dict(length=64, decoded=64), "less than length = 64; got 64"),
    (dict(policies=()), "policies must name at least one; got none"),
    (dict(methods=()), "methods must name at least one; got none"),
    (dict(phases=()), "phases must name at least one; got none"),
    (dict(policies=("dense",)), "policies must rank blocks.*got dense"),
    (dict(policies=("best:3",)), "best"),
    (dict(policies="topk:0.1:window", length="8"), "EvalConfig.length must be of type int; got '8'"),
    (dict(methods=(LearnedGate(),)), "gates must be named, as topk:0.1 is to be measured with the learned gate alone"),
    (dict(policies=("topk:0.3:gate",)), "gates must be named, as topk:0.3"),
    (
        dict(policies=("topk:0.5:oracle",), methods=(SinkWindow(),)),
        "methods must be left out where every policy names its own scorer; got topk:0.5:oracle with window",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=[m for _, m in SETTINGS])
def test_bad_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)


def test_saved_settings_are_those_of_a_config():
    config = EvalConfig(
        text=Path("x"), methods=(SinkWindow(),), phases=(Phase.DECODE,), policies=("topk:0.1",), force=True
    )
    assert EvalConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match=r"registered scorers; got best, colour\. Import the module"):
        EvalConfig.from_json({"methods": ["best"], "colour": 1})


LINE = "x = 1\n"
TEXTS = [
    (LINE * 2000, dict(), None),
    ("", dict(), "must fill at least one window of 256 tokens; got 0 tokens"),
    (LINE, dict(), r"at least one window of 256 tokens; got \d tokens"),
    ("x " * 2000, dict(), "must have several lines.*or set `passkeys` to 0"),
    ("x " * 2000, dict(passkeys=0), None),
    (LINE * 2000, dict(length=30), "room for -"),
    (LINE * 2000, dict(distractors=20), "room for -.*fewer `distractors`"),
    (LINE * 2000, dict(distractors=10**9), "fewer than the 256 tokens of a prompt; got 1000000000"),
    (("x " * 60 + "\n") * 90, dict(length=80), "ends of lines between which the key is stated.*Use a greater length"),
    (LINE * 2000, dict(decoded=4), "greater than the 5 tokens of the longest answer; got 4"),
    (
        LINE * 2000,
        dict(length=20000),
        "`length`, the tokens of a row, must fit the model's context of 16384 tokens; got 20000.*beyond_context=True",
    ),
    (LINE * 20000, dict(length=20000, beyond_context=True, windows=1), None),
    (LINE * 2000, dict(policies=("budget:10:window",)), "at least one block of 64 tokens; got 10"),
    (LINE * 2000, dict(policies=("topk:0.1:window,dense_layers=99",)), "must leave a sparse layer"),
    (LINE * 2000, dict(output=Path("/proc/x")), "output must be writable; got /proc/x"),
    (LINE * 2000, dict(output=Path(__file__)), "output must be a folder; got the file"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("text", "changes", "message"), TEXTS, ids=[f"{t[:4]!r} {c}" for t, c, _ in TEXTS])
def test_what_does_not_fit_is_refused_before_the_work(tmp_path: Path, text: str, changes: dict, message: str | None):
    (tmp_path / "text.txt").write_text(text)
    settings: dict[str, Any] = dict(text=tmp_path / "text.txt", length=256, decoded=16) | changes
    outcome = pytest.raises(Measured) if message is None else pytest.raises((ValueError, OSError), match=message)
    with outcome:
        evaluate(EvalConfig(**settings))


@pytest.mark.usefixtures("no_work")
def test_notes_come_before_the_work(capsys: pytest.CaptureFixture[str]):
    config = EvalConfig(
        policies=("topk:0.1", "topk:0.12", "topk:0.10"), length=512, windows=999, methods=(SinkWindow(),)
    )
    with contextlib.suppress(Measured):
        evaluate(config)
    out = capsys.readouterr().out
    assert "topk:0.1 is named 2 times; it is measured once." in out
    assert "prefill: topk:0.1 and topk:0.12 choose equally many blocks at 512 tokens, 1 of 8 per row" in out
    assert "The text fills 196 windows of 512 tokens; 999 were asked for." in out

"""`seer-jax plot` from end to end: an evaluation, a text and a benchmark become pictures and a page."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from seer_jax.commands import main as cli
from seer_jax.commands.plot.configs import DensityPlot, MapsPlot, TextPlot
from seer_jax.commands.plot.text_maps import TextMaps
from seer_jax.selection.rules import TokenBudget
from seer_jax.selection.scorers import SinkWindow
from tests.seer_jax.commands.fuzz import cases

pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    """Options of a plot of a tiny model on a short text."""
    (tmp_path / "text.txt").write_text("def main(x):\n    return x\n" * 40)
    gates = [str(saved / "prefill"), str(saved / "decode")]
    return ["--model", str(saved / "base"), "--gates", *gates, "--text", str(tmp_path / "text.txt"), "--length", "128"]


@pytest.mark.slow
def test_a_page_shows_both_phases_by_the_policies_of_the_gates(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "out" / "page.html"
    assert cli.main(["plot", "maps", *words, "--output", str(page)]) == 0
    assert "Reading the text, prefill topk:0.4" in (out := capsys.readouterr().out) and f"Drawn: {page}" in out
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    data = json.loads(text)
    phases = [(one["name"], one["policy"], one["heads"], one["columns"], len(one["last"])) for one in data["phases"]]
    assert phases == [("prefill", "topk:0.4", 4, 8, 8), ("decode", "budget:32", 2, 8, 128)]
    assert data["about"] == "base, 128 tokens of text.txt"


def test_pictures(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for options in (["maps", "--phases", "decode", "--heads", "1.0"], ["density"]):
        path = tmp_path / f"{options[0]}.png"
        assert cli.main(["plot", *options, *words, "--output", str(path)]) == 0
        assert f"Drawn: {path}" in capsys.readouterr().out and path.read_bytes().startswith(b"\x89PNG")


def oracle(phase: str) -> str:
    return f"{phase}: topk:0.1:oracle is drawn, as there is no {phase} gate; for others pass --gates with one, or --{phase} POLICY."


# Options, gates, and what is drawn with the lines that say so.
DRAWN: list[tuple[type[TextPlot], dict[str, Any], tuple[str, ...], str, list[str]]] = [
    (DensityPlot, {}, ("prefill", "decode"), "prefill topk:0.4, decode budget:32", []),
    (DensityPlot, {}, (), "prefill topk:0.1:oracle, decode topk:0.1:oracle", [oracle("prefill"), oracle("decode")]),
    (DensityPlot, {}, ("prefill",), "prefill topk:0.4, decode topk:0.1:oracle", [oracle("decode")]),
    (
        DensityPlot,
        dict(decode=TokenBudget(64, SinkWindow())),
        ("prefill",),
        "prefill topk:0.4, decode budget:64:window",
        [],
    ),
    (DensityPlot, dict(phases=("prefill",)), ("prefill",), "prefill topk:0.4", []),
    (MapsPlot, {}, ("decode",), "decode budget:32", []),
    (MapsPlot, {}, ("prefill", "decode"), "prefill topk:0.4", []),
    (MapsPlot, dict(decode=TokenBudget(64)), ("prefill", "decode"), "decode budget:64", []),
    (MapsPlot, {}, (), "prefill topk:0.1:oracle", [oracle("prefill")]),
]


@pytest.mark.parametrize(("kind", "options", "gates", "policies", "notes"), DRAWN)
def test_what_is_drawn_is_what_is_asked_for_or_said(
    kind: type[TextPlot],
    options: dict[str, Any],
    gates: tuple[str, ...],
    policies: str,
    notes: list[str],
    words: list[str],
    saved: Path,
    tmp_path: Path,
):
    named = tuple(str(saved / name) for name in gates)
    base = dict(output=tmp_path / "x.png", text=tmp_path / "text.txt", model=words[1], length=64, gates=named)
    text = TextMaps.of(kind(**base, **options))
    assert text.policies == policies and list(text.notes) == notes
    assert text.title == "base, 64 tokens of text.txt"


def test_scores_and_timings_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, values in (("scores", cases.scores()), ("bench", cases.timings())):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    # The folder of an evaluation stands for its scores.json.
    common = ["--scores", str(tmp_path), "--output", str(tmp_path / "x.svg"), "--rules", "topk"]
    assert cli.main(["plot", "loss", *common]) == 0
    assert cli.main(["plot", "speed", *common, "--bench", str(tmp_path / "bench.json"), "--length", "64"]) == 0
    assert capsys.readouterr().out.count("Drawn: ") == 2
    few, lost = cases.timings(), cases.scores()
    few["measurements"][0]["results"]["density"] = 0.15
    lost["scores"].append(lost["scores"][-1] | {"level": "topk:0.3", "windows": [{"loss": math.nan, "kept": 0.3}] * 2})
    for name, values in (("scores", lost), ("bench", few)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    chosen = ["--methods", "gate", "quest", "--bench", str(tmp_path / "bench.json")]
    assert cli.main(["plot", "speed", *common, *chosen]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "Not drawn: quest, as no score has such a method; the scores have gate.",
        "Not drawn: prefill learned gate topk:0.3, whose perplexity is not finite.",
        "Prefill, attention kernel: 64 tokens, cpu: not drawn, as only 15.0% to 50.0% of the blocks were timed: learned gate, topk at 10.0%. "
        "Measure more --densities.",
    ]


@pytest.mark.parametrize("what", ["loss --scores absent", "density", "maps"])
def test_matplotlib_is_asked_for_before_any_work(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    modules: dict[str, Any] = sys.modules  # None in place of a module makes its import fail
    monkeypatch.setitem(modules, "matplotlib", None)
    assert cli.main(["plot", *what.split(), "--output", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err
    assert (
        said == "seer-jax plot: Plots need the package matplotlib; it is not installed. Run pip install matplotlib.\n"
    )

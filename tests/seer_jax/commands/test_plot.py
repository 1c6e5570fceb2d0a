"""`seer-jax plot` from end to end: an evaluation, a text and a benchmark become pictures and a page."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from seer_jax.commands import main as cli
from seer_jax.commands.plotting.configs import DensityPlot
from seer_jax.commands.plotting.text_maps import TextMaps
from tests.seer_jax.commands.fuzz import cases

pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    """Options of a plot of a tiny model on a short text."""
    (tmp_path / "text.txt").write_text("def main(x):\n    return x\n" * 40)
    gates = [str(saved / "prefill"), str(saved / "decode")]
    return ["--model", str(saved / "base"), "--gates", *gates, "--text", str(tmp_path / "text.txt"), "--length", "128"]


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


def test_without_gates_the_oracle_ranks(words: list[str], tmp_path: Path):
    config = DensityPlot(output=tmp_path / "x.png", text=tmp_path / "text.txt", model=words[1], length=64)
    text = TextMaps.of(config)
    assert text.policies == "prefill topk:0.1:oracle, decode topk:0.1:oracle"
    assert text.title == "base, 64 tokens of text.txt"


def test_scores_and_timings_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, values in (("scores", cases.scores()), ("bench", cases.timings())):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    # The folder of an evaluation stands for its scores.json.
    common = ["--scores", str(tmp_path), "--output", str(tmp_path / "x.svg"), "--rules", "topk"]
    assert cli.main(["plot", "loss", *common]) == 0
    assert cli.main(["plot", "speed", *common, "--bench", str(tmp_path / "bench.json"), "--length", "64"]) == 0
    assert capsys.readouterr().out.count("Drawn: ") == 2


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

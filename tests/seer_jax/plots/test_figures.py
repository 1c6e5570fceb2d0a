"""The figures of scores and benchmarks: what is drawn, from files that seer-jax eval and seer-jax bench write."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax.evaluate import Phase, Score, WindowScore, score_to_json
from seer_jax.plots.density import HeadValues, plot_densities, policy_values
from seer_jax.plots.loss import Curve, loss_curves, plot_loss
from seer_jax.plots.score_files import read_experiments
from seer_jax.plots.speed import Timing, plot_speed, read_timings, trade_off
from seer_jax.plots.style import LOOKS, look_of, spread
from seer_jax.selection.rules import CumulativeMass, Threshold
from seer_jax.selection.scorers import SCORERS

LOSSES = np.array([2.0, 2.3, 1.9])  # of dense attention, by window
NOISE = np.array([-1.0, 0.0, 1.0])


def score(method: str | None, level: str, kept: float, over: float, phase: Phase = Phase.PREFILL) -> Score:
    """A score with perplexity over dense, and 95% ends at 2.484 times `over / 100` of its logarithm around."""
    rule, _, value = level.partition(":")
    policy = {"rule": rule, rule_value(rule): float(value or 0), "scorer": {"name": method}}
    losses = LOSSES + math.log1p(over) + (0 if method is None else 0.01 * math.log1p(over)) * NOISE
    windows = tuple(WindowScore(float(loss), kept) for loss in losses)
    return Score(phase, method, level, windows, (), 300, 1.0, {"rule": "dense"} if method is None else policy)


def rule_value(rule: str) -> str:
    return {"topk": "density", "mass": "mass", "threshold": "threshold", "budget": "tokens"}.get(rule, "")


def ladder(method: str, scale: float = 1.0, phase: Phase = Phase.PREFILL) -> list[Score]:
    return [score(method, f"topk:{kept}", kept, scale * 0.001 / kept**2, phase) for kept in (0.1, 0.2, 0.4)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of scores."""

    def write(name: str, scores: list[Score], **facts: Any) -> Path:
        known = dict(
            config={"length": 101}, model={"name": "models/tiny", "fingerprint": "f"}, gates=[{"name": "a/gate"}]
        )
        known |= {"text": {"path": "texts/book.txt", "sha256": "0", "windows": 3}} | facts
        path = tmp_path / name
        path.write_text(json.dumps({**known, "scores": [score_to_json(one) for one in scores]}))
        return path

    return write


DENSE = score(None, "dense", 1.0, 0.0)


def test_curves_are_levels_over_dense_by_their_density(write: Callable[..., Path]):
    path = write("scores.json", [DENSE, *ladder("gate"), *ladder("oracle", 0.5), score("gate", "mass:0.9", 0.3, 0.002)])
    (experiment,) = read_experiments([path])
    assert (experiment.title, experiment.length) == ("tiny, 101 tokens, book.txt", 101)
    curves = {(curve.method, curve.rule): curve for curve in loss_curves(experiment, Phase.PREFILL)}
    assert list(curves) == [("gate", "topk"), ("oracle", "topk"), ("gate", "mass")]
    points = curves["gate", "topk"].points
    np.testing.assert_allclose([point.kept for point in points], [0.4, 0.2, 0.1])
    np.testing.assert_allclose([point.over for point in points], [0.625, 2.5, 10], rtol=1e-9)
    # Student's quantile of two degrees of freedom, 4.303, times 0.01 / sqrt(3) of the loss.
    ends = [100 * math.expm1(math.log1p(0.1) * (1 + sign * 4.303 * 0.01 / math.sqrt(3))) for sign in (-1, 1)]
    np.testing.assert_allclose(points[2][2:], ends, rtol=1e-4)
    kept, low, high = curves["gate", "topk"].needed or (0, 0, 0)
    assert 0.2 < low < kept < high < 0.4
    assert curves["gate", "topk"].label == f"learned gate, topk: {kept:.0%} ({low:.0%} to {high:.0%})"
    assert curves["gate", "mass"].needed is None and curves["gate", "mass"].label == "learned gate, mass"
    assert [x.method for x in loss_curves(experiment, Phase.PREFILL, methods=["oracle"])] == ["oracle"]
    assert [x.rule for x in loss_curves(experiment, Phase.PREFILL, rules=["mass"])] == ["mass"]


@pytest.mark.parametrize(("scale", "label"), [(100.0, "window, topk: >40%"), (0.01, "window, topk: <10%")])
def test_needed_blocks_outside_the_ladder_say_so(write: Callable[..., Path], scale: float, label: str):
    (experiment,) = read_experiments([write("scores.json", [DENSE, *ladder("window", scale)])])
    assert [curve.label for curve in loss_curves(experiment, Phase.PREFILL)] == [f"sink+{label}"]


def test_files_of_one_experiment_share_its_panels(write: Callable[..., Path]):
    first = write("a.json", [DENSE, *ladder("gate"), *ladder("window", 3.0)])
    second = write("b.json", [DENSE, *ladder("gate", 0.5), *ladder("window", 2.0)], gates=[{"name": "b/gate"}])
    other = write("c.json", [DENSE, *ladder("gate")], text={"path": "x", "sha256": "1", "windows": 3})
    both, alone = read_experiments([first, second, other])
    names = sorted(curve.name for curve in loss_curves(both, Phase.PREFILL))
    # The later file's window replaces the earlier one's; gates of two folders are two curves.
    assert names == ["learned gate (a/gate), topk", "learned gate (b/gate), topk", "sink+window, topk"]
    (window,) = loss_curves(both, Phase.PREFILL, methods=["window"])
    assert window.points[-1].over == pytest.approx(20)
    assert [curve.name for curve in loss_curves(alone, Phase.PREFILL)] == ["learned gate, topk"]


def test_unregistered_methods_are_drawn_by_their_names(write: Callable[..., Path]):
    (experiment,) = read_experiments([write("scores.json", [DENSE, *ladder("mine")])])
    assert [curve.name for curve in loss_curves(experiment, Phase.PREFILL)] == ["mine, topk"]


def bench(tmp_path: Path, *lines: dict[str, Any], device: str = "a GPU") -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"device": device, "measurements": list(lines)}))
    return path


def line(density: float | None, speedup: float | None, length: int = 1024, **settings: Any) -> dict[str, Any]:
    known = {"num_queries": length, "density": density, "lists": 4, "heads": 4} | settings
    results = {"density": density or 1.0, "speedup": speedup}
    return {"table": "attention", "settings": known, "results": results, "failure": None}


def test_timings_are_those_of_the_longest_sequences_or_of_a_length(tmp_path: Path):
    lines = [line(0.1, 5.0), line(0.5, 2.0), line(0.1, 8.0, 2048), line(0.5, 2.0, 2048), line(0.1, 9.0, 4096)]
    # Shared lists, skipped blocks, other tables, dense lines and failures are left out.
    lines += [line(0.2, 9.0, 2048, skip_threshold=1e-3), line(0.2, 9.0, 2048, peak=2.0)]
    lines += [line(0.2, 9.0, 2048, lists=1), line(0.3, None, 2048), line(None, 1.0, 2048)]
    lines += [line(0.4, 9.0, 2048) | {"failure": "wrong"}, line(0.4, 9.0, 2048) | {"table": "cases"}]
    path = bench(tmp_path, *lines)
    (timing,) = read_timings([path])
    assert timing == Timing(Phase.PREFILL, "attention kernel", 2048, 1, "a GPU", ((0.1, 8.0), (0.5, 2.0)))
    assert timing.title == "Prefill, attention kernel: 2048 tokens, a GPU"
    assert read_timings([path], length=1024)[0].speedups == ((0.1, 5.0), (0.5, 2.0))
    # Half way in density is half way in time.
    assert timing.speedup(0.3) == pytest.approx(2 / (1 / 8 + 1 / 2)) and timing.speedup(0.1) == pytest.approx(8)
    assert timing.speedup(0.05) is None and timing.speedup(0.6) is None
    with pytest.raises(ValueError, match=r"at 77 tokens; it has them at lengths: 1024, 2048\. Measure --densities"):
        read_timings([path], length=77)


def test_trade_offs_pair_loss_and_speed_at_the_same_density(write: Callable[..., Path]):
    timing = Timing(Phase.PREFILL, "kernel", 1024, 1, "GPU", ((0.1, 8.0), (0.3, 3.0)))
    (experiment,) = read_experiments([write("scores.json", [DENSE, *ladder("gate")])])
    (curve,) = loss_curves(experiment, Phase.PREFILL)
    levels, way = trade_off(curve, timing)
    np.testing.assert_allclose(levels, [(2.5, 1 / (0.5 / 8 + 0.5 / 3)), (10, 8)], rtol=1e-6)  # 40% was not timed
    np.testing.assert_allclose([way[0], way[-1]], levels[::-1], rtol=1e-6)
    assert (np.diff([trade.over for trade in way]) < 0).all() and (np.diff([trade.speedup for trade in way]) < 0).all()


def test_figures_are_drawn(write: Callable[..., Path], tmp_path: Path):
    dense = [DENSE, score(None, "dense", 1.0, 0.0, Phase.DECODE)]
    scores = [*dense, *ladder("gate"), *ladder("oracle", -0.1), *ladder("mine", 3.0, Phase.DECODE)]
    experiments = read_experiments([write("scores.json", scores)])
    loss = plot_loss(tmp_path / "new" / "loss.svg", experiments)
    timings = read_timings([bench(tmp_path, line(0.1, 8.0), line(0.5, 2.0))])
    speed = plot_speed(tmp_path / "speed.svg", experiments, timings)
    heads = [HeadValues("kept", np.full((3, 4), 0.5)), HeadValues("threshold", np.eye(3), is_share=False)]
    density = plot_densities(tmp_path / "density.svg", heads)
    assert all(path.read_bytes().startswith(b"<?xml") for path in (loss, speed, density))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, None),
        (np.array([0.25, 0.5]), [[0.25] * 3, [0.5] * 3]),
        (np.array([[0.25, 0.5, 0.75]]), [[0.25, 0.5, 0.75]] * 2),
    ],
)
def test_values_per_head_are_spread_over_layers_and_heads(value: Any, expected: Any):
    for rule in (Threshold, CumulativeMass):
        found = policy_values(rule(value), 2, 3)
        assert (None if found is None else found.tolist()) == expected


def test_methods_have_looks_of_their_own():
    assert len({*LOOKS.values()}) == len(LOOKS) and len({look.colour for look in LOOKS.values()}) == len(LOOKS)
    assert look_of("mine") not in LOOKS.values()
    built_in = {kind.name for kind in SCORERS.values() if kind.__module__.startswith("seer_jax.")}
    assert built_in <= set(LOOKS)


def test_labels_are_moved_apart_below_the_top():
    places = spread([0.1, 0.11, 0.5, 0.98, 0.99, 1.0], 0.1)
    assert min(np.diff(places)) >= 0.1 - 1e-9 and max(places) <= 1
    assert places[2] == 0.5


GOOD = [DENSE, *ladder("gate")]
WRITER = "Name a file that seer-jax eval"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"scores.json must hold JSON; .* {WRITER}"),
        ("[]", f"scores.json must hold 'scores', a list; it holds something else. {WRITER}"),
        ('{"scores": 3}', f"scores.json must hold 'scores', a list; it holds something else. {WRITER}"),
        ('{"scores": [{}]}', f"scores.json must hold scores that can be read; .* {WRITER}"),
        ('{"scores": []}', f"scores.json must hold scores besides dense ones; it holds none. {WRITER}"),
    ],
)
def test_files_without_scores_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_experiments([path])


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        (ladder("gate"), {}, "tiny, 101 tokens, book.txt: the scores must hold dense attention in prefill"),
        (GOOD, dict(methods=["best"]), "must hold a method and rule that are asked for; they hold gate topk."),
        (GOOD, dict(rules=["mass"]), "must hold a method and rule that are asked for; they hold gate topk."),
    ],
)
def test_what_can_not_be_drawn_is_refused(
    write: Callable[..., Path], tmp_path: Path, scores: list[Score], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        plot_loss(tmp_path / "x.png", read_experiments([write("scores.json", scores)]), **settings)


def test_scores_of_other_tokens_are_refused(write: Callable[..., Path]):
    longer = Score(Phase.PREFILL, "window", "topk:0.2", DENSE.windows, (), 600, 1.0, GOOD[1].policy)
    with pytest.raises(
        ValueError, match=r"b.json must have scored the tokens .*, 300 in prefill; got 600. Plot the files one"
    ):
        read_experiments([write("a.json", GOOD), write("b.json", [longer])])


def test_speed_needs_densities_that_were_timed(write: Callable[..., Path], tmp_path: Path):
    timings = [Timing(Phase.PREFILL, "kernel", 1024, 1, "GPU", ((0.01, 8.0), (0.02, 3.0)))]
    with pytest.raises(ValueError, match=r"levels at densities that were timed \(prefill 1% to 2%\); they have none"):
        plot_speed(tmp_path / "x.png", read_experiments([write("scores.json", GOOD)]), timings)


def test_a_curve_knows_its_rule_s_dashes():
    curves = [
        Curve(Phase.DECODE, "gate", rule, "", (), None) for rule in ("topk", "topk,dense_layers=2", "mass per head")
    ]
    assert [curve.dashes for curve in curves] == ["-", "-", "--"]

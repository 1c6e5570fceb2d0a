"""Speed against quality: how many times faster than dense at what perplexity over dense, from a benchmark and an evaluation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.statistics.blocks_needed import TARGET
from seer_jax.plots.loss import Curve, loss_curves, set_over_scale
from seer_jax.plots.score_files import Experiment, read_lists
from seer_jax.plots.style import FAINT, INK, drawing, look_of

WRITER = "Name a file that seer-jax bench prefill --output FILE wrote, or bench decode."
PANEL = 3.4  # inches
STEPS = 9  # of a line from one level to the next
# Table of a benchmark: its phase, what it times, and the setting with the tokens.
TABLES = {
    "attention": (Phase.PREFILL, "attention kernel", "num_queries"),
    "model": (Phase.PREFILL, "time to first token", "length"),
    "decode kernel": (Phase.DECODE, "attention kernel", "length"),
    "decode layer": (Phase.DECODE, "one layer's attention", "length"),
    "decode model": (Phase.DECODE, "time per token", "length"),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times faster than dense of one part at one size, by the measured share of the blocks.

    Attributes:
      phase, part: what was timed.
      length, batch: tokens of each sequence, and sequences.
      device: as its maker calls it.
      speedups: (share of the blocks, times faster), by share; at least two.
    """

    phase: Phase
    part: str
    length: int
    batch: int
    device: str
    speedups: tuple[tuple[float, float], ...]

    def speedup(self, kept: float) -> float | None:
        """Times faster at a share of the blocks: the time is interpolated linearly between measured shares; None outside them."""
        shares, speedups = zip(*self.speedups, strict=True)
        if not shares[0] <= kept <= shares[-1]:
            return None
        return 1 / float(np.interp(kept, shares, 1 / np.asarray(speedups)))

    @property
    def title(self) -> str:
        """What was timed, where."""
        size = f"{self.batch} x {self.length}" if self.batch > 1 else f"{self.length}"
        return f"{self.phase.value.capitalize()}, {self.part}: {size} tokens, {self.device}"


def read_timings(paths: Sequence[Path], *, length: int | None = None) -> list[Timing]:
    """The timings of benchmarks: of each part the largest batch, at one length.

    Args:
      paths: JSON files of `seer-jax bench prefill` and `bench decode`; more densities of the same part add up.
      length: tokens of each sequence; None: the largest that was measured.

    Raises:
      OSError: a file can't be read.
      ValueError: a file holds no measurements, or none has two shares of the blocks with dense times beside them at this length.
    """
    found: dict[tuple[str, int, int, str], dict[float, float]] = {}
    for path in paths:
        values = read_lists(path, "measurements", WRITER)
        for line in values["measurements"]:
            if (place := _place(line)) is not None:
                results = line["results"]
                found.setdefault((*place, str(values.get("device"))), {})[results["density"]] = results["speedup"]
    sizes = {key: tuple(sorted(of.items())) for key, of in found.items() if len(of) > 1}
    timings = []
    for table, (phase, part, _) in TABLES.items():
        keys = [key for key in sizes if key[0] == table and length in (None, key[1])]
        if keys:
            _, tokens, batch, device = key = max(keys, key=lambda key: key[1:3])
            timings.append(Timing(phase, part, tokens, batch, device, sizes[key]))
    if not timings:
        lengths = ", ".join(map(str, sorted({tokens for _, tokens, _, _ in sizes}))) or "none"
        raise ValueError(
            f"The benchmark must have two densities or more with dense times beside them{'' if length is None else f' at {length} tokens'}; "
            f"it has them at lengths: {lengths}. Measure --densities 0.05 0.1 0.2 0.5."
        )
    return timings


def _place(line: Any) -> tuple[str, int, int] | None:
    """Table, tokens and batch of a measurement that has a speedup at a share of the blocks; of kernels the lists that heads have alone."""
    if not isinstance(line, Mapping) or line.get("table") not in TABLES or line.get("failure"):
        return None
    settings, results = line.get("settings"), line.get("results")
    if not isinstance(settings, Mapping) or not isinstance(results, Mapping) or settings.get("density") is None:
        return None
    if settings.get("lists") != settings.get("heads") and "lists" in settings:
        return None
    # Blocks are skipped by weights, not by lists.
    if settings.get("skip_threshold") is not None or settings.get("peak"):
        return None
    tokens, batch = settings.get(TABLES[line["table"]][2]), settings.get("batch", 1)
    figures = [results.get(name) for name in ("density", "speedup")]
    if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in (*figures, tokens, batch)):
        return None
    return line["table"], int(tokens), int(batch)  # pyright: ignore[reportArgumentType]


class Trade(NamedTuple):
    """What a share of the blocks costs and gives: perplexity over dense in percent, and times faster than dense."""

    over: float
    speedup: float


def trade_off(curve: Curve, timing: Timing) -> tuple[list[Trade], list[Trade]]:
    """The levels of a curve that lie within the timed shares; and the way from one to the next, interpolated as for blocks needed."""
    timed = [point for point in curve.points if timing.speedup(point.kept) is not None]
    if not timed:
        return [], []
    shares, overs = np.array([(point.kept, math.asinh(10 * point.over)) for point in timed[::-1]]).T
    steps = np.unique(np.append(shares, np.linspace(shares[:-1], shares[1:], STEPS)))
    between = np.sinh(np.interp(steps, shares, overs)) / 10
    levels = [Trade(point.over, timing.speedup(point.kept) or math.nan) for point in timed]
    return levels, [
        Trade(float(over), timing.speedup(kept) or math.nan) for kept, over in zip(steps, between, strict=True)
    ]


def not_timed(
    experiments: Sequence[Experiment],
    timings: Sequence[Timing],
    *,
    methods: Sequence[str] = (),
    rules: Sequence[str] = (),
) -> list[str]:
    """One line for each timing: the levels that lie outside the timed shares of the blocks, and so have no time.

    Args:
      experiments: of scores.json.
      timings: of benchmarks.
      methods, rules: see `loss_curves`.
    """
    lines = []
    for timing in timings:
        curves = [
            curve
            for one in experiments
            if timing.phase in one.phases
            for curve in loss_curves(one, timing.phase, methods=methods, rules=rules)
        ]
        missing = dict.fromkeys(
            f"{curve.name} at {point.kept:.1%}"
            for curve in curves
            for point in curve.points
            if timing.speedup(point.kept) is None
        )
        if missing:
            shares = f"{timing.speedups[0][0]:.1%} to {timing.speedups[-1][0]:.1%}"
            lines.append(
                f"{timing.title}: not drawn, as only {shares} of the blocks were timed: {', '.join(missing)}. Measure more --densities."
            )
    return lines


def plot_speed(
    path: Path,
    experiments: Sequence[Experiment],
    timings: Sequence[Timing],
    *,
    methods: Sequence[str] = (),
    rules: Sequence[str] = (),
) -> Path:
    """Writes a figure with a panel for each timing and experiment of its phase.

    Args:
      path: PNG, SVG or PDF file.
      experiments: of scores.json.
      timings: of benchmarks.
      methods, rules: see `loss_curves`.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no level lies within the timed shares of the blocks.
    """
    panels = []
    for timing in timings:
        for experiment in (one for one in experiments if timing.phase in one.phases):
            curves = loss_curves(experiment, timing.phase, methods=methods, rules=rules)
            lines = [(curve, *line) for curve in curves if (line := trade_off(curve, timing))[0]]
            panels += [(timing, experiment, lines)] * bool(lines)
    if not panels:
        shares = ", ".join(f"{t.phase.value} {t.speedups[0][0]:.0%} to {t.speedups[-1][0]:.0%}" for t in timings)
        raise ValueError(
            f"The scores must have levels at densities that were timed ({shares}); they have none. Measure more --densities, or other policies."
        )
    with drawing(path, PANEL * len(panels)) as figure:
        for axis, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw(axis, *panel)
    return path


def _draw(
    axis: Any, timing: Timing, experiment: Experiment, lines: Sequence[tuple[Curve, list[Trade], list[Trade]]]
) -> None:
    at_target = [None if curve.needed is None else timing.speedup(curve.needed[0]) for curve, _, _ in lines]
    for n in sorted(range(len(lines)), key=lambda n: -(at_target[n] or 0)):
        (curve, levels, line), speedup = lines[n], at_target[n]
        look = look_of(curve.method)
        label = curve.name + ("" if speedup is None else f": {speedup:.1f} times")
        axis.plot(*zip(*line, strict=True), color=look.colour, linestyle=curve.dashes)
        axis.plot(*zip(*levels, strict=True), color=look.colour, marker=look.marker, linestyle="")
        axis.plot([], color=look.colour, marker=look.marker, linestyle=curve.dashes, label=label)
    axis.axvline(100 * TARGET, color=INK, linewidth=0.8, linestyle=(0, (6, 3)))
    axis.axhline(1, color=FAINT, linewidth=0.8)
    axis.set_title(f"{timing.title}\nQuality: {experiment.title}", pad=18)  # above the title of the labels
    axis.set_xlabel("perplexity over dense")
    axis.set_ylabel("times faster than dense")
    set_over_scale(axis, "x", [trade.over for _, levels, _ in lines for trade in levels])
    axis.set_ylim(bottom=0)
    axis.legend(
        title="method, rule: faster at +1%", loc="upper left", bbox_to_anchor=(1.0, 1.03), alignment="left", fontsize=8
    )

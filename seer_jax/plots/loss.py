"""Loss against density: perplexity over dense by the share of the blocks that is kept, for all methods, with 95% intervals."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.score import perplexity_over
from seer_jax.evaluate.statistics.blocks_needed import (
    BELOW,
    LEAST_LEVELS,
    TARGET,
    blocks_needed,
    ladders,
)
from seer_jax.plots.score_files import Experiment
from seer_jax.plots.style import FAINT, INK, End, drawing, label_ends, look_of, title_of

DASHES = {"topk": "-", "mass": "--", "threshold": (0, (1, 1)), "budget": "-."}
TICKS_KEPT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), (0.03, 0.07, 0.15, 0.25, 0.35, 0.4, 0.45, 0.6, 0.8, 0.9)
TICKS_OVER = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000)
PANEL = 3.4  # inches


class Point(NamedTuple):
    """A level: the share of the blocks that is kept, and perplexity over dense in percent with its 95% interval (NaN: one window)."""

    kept: float
    over: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Levels of one method under one rule.

    Attributes:
      phase, method, rule: as in `BlocksNeeded`.
      gates: which gates, where an experiment has several; otherwise "".
      points: by their share of the blocks, the densest first.
      needed: share of the blocks for +1%, and the ends of its interval, see `blocks_needed`; None with fewer than three levels.
    """

    phase: Phase
    method: str
    rule: str
    gates: str
    points: tuple[Point, ...]
    needed: tuple[float, float, float] | None

    @property
    def name(self) -> str:
        """Method, gates and rule."""
        return title_of(self.method) + (f" ({self.gates})" if self.gates else "") + f", {self.rule}"

    @property
    def label(self) -> str:
        """The name, and the share of the blocks for +1% where it is known."""
        return self.name + (f": {self._needed()}" if self.needed else "")

    @property
    def dashes(self) -> Any:
        """Style of the line: the rule's."""
        return DASHES.get(rule_of(self.rule), "-")

    def _needed(self) -> str:
        assert self.needed is not None
        kept, low, high = self.needed
        if math.isinf(kept):
            return self._outside(kept)
        ends = [f"{end:.0%}" if math.isfinite(end) else self._outside(end) for end in (low, high)]
        return f"{kept:.0%}" + ("" if math.isnan(low) or math.isnan(high) else f" ({' to '.join(ends)})")

    def _outside(self, share: float) -> str:
        """A share outside the ladder."""
        return f"<{self.points[-1].kept:.0%}" if share == BELOW else f">{self.points[0].kept:.0%}"


def rule_of(text: str) -> str:
    """Name of the rule, without the settings that `BlocksNeeded.rule` has behind it.

    >>> rule_of("topk,dense_layers=2"), rule_of("threshold per head")
    ('topk', 'threshold')
    """
    return text.partition(",")[0].split()[0]


def loss_curves(
    experiment: Experiment, phase: Phase, *, methods: Sequence[str] = (), rules: Sequence[str] = ()
) -> list[Curve]:
    """The curves of a phase.

    Args:
      experiment: of scores.json.
      phase: of the scores.
      methods, rules: names of those that are wanted; none: all.

    Raises:
      ValueError: the experiment has no dense score in the phase.
    """
    dense, found = experiment.dense(phase), []
    of_gates = {one.gates for one in experiment.scores if one.score.method == "gate"}
    for gates in sorted({one.gates for one in experiment.scores}):
        scores = [one.score for one in experiment.scores if one.gates == gates and one.score.phase is phase]
        for (_, method, rule, _), ladder in ladders(scores).items():
            if (methods and method not in methods) or (rules and rule_of(rule) not in rules):
                continue
            points = [Point(s.kept, *(100 * x for x in perplexity_over(s, dense))) for s in ladder]
            finite = sorted((point for point in points if math.isfinite(point.over)), reverse=True)
            needed = blocks_needed(ladder, dense) if len(ladder) >= LEAST_LEVELS else None
            named = gates if method == "gate" and len(of_gates) > 1 else ""
            if finite:
                found.append(Curve(phase, method, rule, named, tuple(finite), needed))
    return found


def not_drawn(
    experiments: Sequence[Experiment], *, methods: Sequence[str] = (), rules: Sequence[str] = ()
) -> list[str]:
    """One line for the names that no score has, and one for the levels whose perplexity is not finite.

    Args:
      experiments: of scores.json.
      methods, rules: see `loss_curves`.
    """
    keys = [key for x in experiments for key in ladders([s.score for s in x.scores])]
    lines = []
    for kind, asked, held in (
        ("method", methods, {method for _, method, _, _ in keys}),
        ("rule", rules, {rule_of(rule) for _, _, rule, _ in keys}),
    ):
        if missing := [name for name in asked if name not in held]:
            lines.append(
                f"Not drawn: {', '.join(missing)}, as no score has such a {kind}; the scores have {', '.join(sorted(held))}."
            )
    infinite = [s.score for x in experiments for s in x.scores if not math.isfinite(s.score.perplexity)]
    if infinite:
        shown = dict.fromkeys(f"{score.phase} {title_of(score.method or '')} {score.level}" for score in infinite)
        lines.append(f"Not drawn: {', '.join(shown)}, whose perplexity is not finite.")
    return lines


def plot_loss(
    path: Path, experiments: Sequence[Experiment], *, methods: Sequence[str] = (), rules: Sequence[str] = ()
) -> Path:
    """Writes a figure with a panel for each experiment and phase.

    Args:
      path: PNG, SVG or PDF file.
      experiments: of scores.json.
      methods, rules: see `loss_curves`.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is nothing to draw.
    """
    pairs = [(experiment, phase) for experiment in experiments for phase in experiment.phases]
    panels = [(x, phase, loss_curves(x, phase, methods=methods, rules=rules)) for x, phase in pairs]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        held = sorted(
            {
                f"{method} {rule_of(rule)}"
                for x in experiments
                for _, method, rule, _ in ladders([s.score for s in x.scores])
            }
        )
        raise ValueError(
            f"The scores must hold a method and rule that are asked for; they hold {', '.join(held) or 'none'}."
        )
    with drawing(path, PANEL * len(panels)) as figure:
        for axis, (experiment, phase, curves) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            axis.set_title(f"{phase.value.capitalize()}: {experiment.title}", pad=18)  # above the title of the labels
            _draw(axis, curves)
        axis.set_xlabel("blocks kept (sparser to the right)")
    return path


def _draw(axis: Any, curves: Sequence[Curve]) -> None:
    for curve in sorted(curves, key=lambda curve: curve.method.startswith("oracle")):
        look, (kept, over, low, high) = look_of(curve.method), zip(*curve.points, strict=True)
        axis.plot(kept, over, color=look.colour, marker=look.marker, linestyle=curve.dashes)
        axis.vlines(kept, low, high, color=look.colour, linewidth=1, alpha=0.5)
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.axhline(100 * TARGET, color=INK, linewidth=0.8, linestyle=(0, (6, 3)))
    axis.set_ylabel("perplexity over dense")
    axis.set_xscale("log")
    axis.margins(x=0.02, y=0.05)
    # By the levels: ends of wide intervals may lie outside.
    set_over_scale(axis, "y", [point.over for curve in curves for point in curve.points])
    axis.invert_xaxis()
    low, high = sorted(axis.get_xlim())
    ticks, more = ([x for x in group if low <= x <= high] for group in TICKS_KEPT)
    axis.set_xticks(ticks if len(ticks) > 2 else [*ticks, *more] or [low, high], minor=False)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.minorticks_off()
    ends = [End(*curve.points[-1][:2], curve.label, look_of(curve.method)) for curve in curves]
    label_ends(axis, ends, title="method, rule: blocks for +1%")


def set_over_scale(axis: Any, side: str, shown: Sequence[float]) -> None:
    """Makes the "x" or "y" side of an axis one of perplexity over dense, in percent: linear up to 1%, logarithmic above.

    Args:
      axis: of matplotlib.
      side: "x" or "y".
      shown: what its limits hold, besides 0 and 1%.
    """
    low, high = min(*shown, 0) * 1.3 - 0.15, max(*shown, 1) * 1.3
    getattr(axis, f"set_{side}scale")("symlog", linthresh=1.0, linscale=0.7)
    getattr(axis, f"set_{side}lim")(low, high)
    getattr(axis, f"set_{side}ticks")([tick for tick in TICKS_OVER if low <= tick <= high])
    getattr(axis, f"{side}axis").set_major_formatter(lambda over, _: f"{over:+g}%" if over else "0")

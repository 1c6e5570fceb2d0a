"""Measurements as plots."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seer_jax.bench.harness.measurement import Measurement, hardware
from seer_jax.plots.style import COLOURS, FAINT, LINES, drawing

PANEL = 3.4  # inches
AXES = {
    "density": ("share of the causal map's blocks", ".0%"),
    "devices": ("devices", "d"),
}  # label and format of ticks; otherwise tokens


@dataclasses.dataclass(frozen=True)
class Panel:
    """A diagram of one table, with a curve for each colour and line style.

    Attributes:
      title: above it.
      table: name of the table.
      colour, style: what the measurements of a curve have in common, as the legend names it.
      x: name of a setting, whose values are the ticks; where it is a result too, measurements lie at that.
      y, y_label: name of a result, and the axis.
    """

    title: str
    table: str
    colour: Callable[[Measurement], str]
    style: Callable[[Measurement], str]
    x: str = "length"
    y: str = "speedup"
    y_label: str = "times faster than dense"

    def lines(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """The measurements that the panel draws: not those of what is dense."""
        lines = [m for m in measurements if m.table == self.table and m.settings.get("density", 1.0) is not None]
        return [m for m in lines if m.results.get(self.y) is not None]


def plot_panels(path: Path, panels: Sequence[Panel], measurements: Sequence[Measurement]) -> None:
    """Writes a figure of the panels that have measurements; the suffix of the name is its format.

    Raises:
      ValueError: none has.
    """
    drawn = [(panel, lines) for panel in panels if (lines := panel.lines(measurements))]
    if not drawn:
        raise ValueError("A plot must have measurements with a dense time beside them; got none to draw.")
    colours = list(dict.fromkeys(panel.colour(m) for panel, lines in drawn for m in lines))  # the same in every panel
    with drawing(path, PANEL * len(drawn)) as figure:
        for axis, (panel, lines) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
            _draw(axis, panel, lines, colours)
            axis.set_title(f"{panel.title[0].upper()}{panel.title[1:]}, {hardware()['device']}")


def _draw(axis: Any, panel: Panel, lines: Sequence[Measurement], colours: list[str]) -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for m in lines:
        point = {**m.settings, **m.results}[panel.x], m.results[panel.y] or 0.0
        curves.setdefault((panel.colour(m), panel.style(m)), []).append(point)
    styles = list(dict.fromkeys(style for _, style in curves))
    for (colour, style), points in curves.items():
        look = dict(
            color=COLOURS[colours.index(colour) % len(COLOURS)], linestyle=LINES[styles.index(style) % len(LINES)]
        )
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{colour}, {style}", **look)
    axis.axhline(1, color=FAINT, linewidth=1)
    if panel.x == "density":
        kept = sorted(x for points in curves.values() for x, _ in points)
        axis.plot(kept, [1 / x for x in kept], color=FAINT, linewidth=1, label="ideal, 1 / share")
    ticks, (label, form) = sorted({m.settings[panel.x] for m in lines}), AXES.get(panel.x, ("tokens", "d"))
    axis.set(xlabel=label, ylabel=panel.y_label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ticks, [format(x, form) for x in ticks], minor=False)
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.minorticks_off()
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=8)

"""Measurements as plots."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seer_jax.bench.harness.measurement import Measurement, hardware

STYLES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Panel:
    """A diagram of one table: a result against a setting or another result, with a curve for each colour and line style.

    Attributes:
      title: above it.
      table: name of the table.
      x, y: names of a setting or result.
      x_label, y_label: of the axes.
      colour, style: what measurements of one curve have in common, as the legend names it.
      ticks: name of the setting that has the ticks of the x axis.
      tick: how a tick is written.
      ideal: whether to draw 1 / x.
      shown: which of the table's measurements are drawn.
    """

    title: str
    table: str
    colour: Callable[[Measurement], str]
    style: Callable[[Measurement], str]
    x: str = "length"
    y: str = "speedup"
    x_label: str = "tokens"
    y_label: str = "times faster than dense attention"
    ticks: str = "length"
    tick: str = "d"
    ideal: bool = False
    shown: Callable[[Measurement], bool] = lambda m: True

    def lines(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """The measurements that the panel draws."""
        return [
            m for m in measurements if m.table == self.table and m.results.get(self.y) is not None and self.shown(m)
        ]


def check_matplotlib() -> None:
    """Raises ImportError with advice where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'seer-jax[plot]'.") from error


def plot_panels(path: Path, panels: Sequence[Panel], measurements: Sequence[Measurement]) -> Path:
    """Writes a PNG of the panels that have measurements.

    Raises:
      ValueError: none has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(panel, lines) for panel in panels if (lines := panel.lines(measurements))]
    if not drawn:
        raise ValueError(
            "A plot must have measurements with a dense time beside them; got none to draw. Measure the parts that it shows."
        )
    figure = Figure(figsize=(1 + 5.5 * len(drawn), 5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    # The same colour for the same thing in every panel.
    colours = list(dict.fromkeys(panel.colour(m) for panel, lines in drawn for m in lines))
    for axis, (panel, lines) in zip(axes, drawn, strict=True):
        _draw(axis, panel, lines, colours)
    figure.suptitle(hardware()["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axis: Any, panel: Panel, lines: Sequence[Measurement], colours: list[str]) -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for m in lines:
        values = {**m.settings, **m.results}
        curves.setdefault((panel.colour(m), panel.style(m)), []).append((values[panel.x], values[panel.y]))
    styles = list(dict.fromkeys(style for _, style in curves))
    if panel.ideal:
        kept = sorted(x for points in curves.values() for x, _ in points)
        axis.plot(kept, [1 / x for x in kept], color="0.5", linewidth=1, label="ideal, 1 / share")
    axis.axhline(1, color="0.5", linewidth=1)
    for (colour, style), points in curves.items():
        look = dict(color=f"C{colours.index(colour)}", linestyle=STYLES[styles.index(style) % len(STYLES)])
        axis.plot(*zip(*sorted(points), strict=True), marker=".", label=f"{colour}, {style}", **look)
    ticks = sorted({m.settings[panel.ticks] for m in lines})
    axis.set_title(panel.title)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format(x, panel.tick) for x in ticks], minor=False)
    axis.set_xlabel(panel.x_label)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.set_ylabel(panel.y_label)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)

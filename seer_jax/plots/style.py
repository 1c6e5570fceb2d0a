"""The look of all plots: one colour and marker per method, readable at the width of a page, safe for colour-blind readers."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seer_jax.outputs import check_matplotlib, write_bytes
from seer_jax.selection.scorers import SCORERS

WIDTH = 8.5  # inches: 1700 pixels, twice the width of a page on a screen
DPI = 200
INK, FAINT = "#222222", "#9a9a9a"
WEIGHTS, SHARES = "magma", "cividis"  # colour maps of attention weights, and of shares of the blocks
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.hashsalt": "seer-jax",
}
LINES = ("-", "--", ":", "-.")


class Look(NamedTuple):
    """Colour and marker of a method."""

    colour: str
    marker: str


# Okabe and Ito's palette; what is no method of its own kind (bounds, baselines) is black or grey.
LOOKS = {
    "gate": Look("#0072B2", "o"),
    "oracle": Look("#000000", "D"),
    "oracle-mass": Look("#5f5f5f", "d"),
    "window": Look("#8f8f8f", "s"),
    "random": Look("#bdbdbd", "x"),
    "xattention": Look("#D55E00", "^"),
    "subblock": Look("#009E73", "v"),
    "flexprefill": Look("#CC79A7", "P"),
    "minference": Look("#E69F00", "X"),
    "proxyattn": Look("#56B4E9", "<"),
    "quest": Look("#7A4A1E", ">"),
}
OTHERS = (Look("#117733", "h"), Look("#882255", "p"), Look("#332288", "8"), Look("#999933", "*"))


def look_of(method: str) -> Look:
    """The look of a method, the same in every plot; methods that are not listed take the other looks in the order of their names."""
    if method in LOOKS:
        return LOOKS[method]
    further = sorted(name for name in {*SCORERS, method} if name not in LOOKS)
    return OTHERS[further.index(method) % len(OTHERS)]


def title_of(method: str) -> str:
    """Title of a method; its name where its scorer is not registered."""
    return SCORERS[method].title if method in SCORERS else method


@contextlib.contextmanager
def drawing(path: Path, height: float, *, width: float = WIDTH) -> Iterator[Any]:
    """Yields a matplotlib figure and writes it when it is drawn, in one step; the suffix of the name is the format.

    Args:
      path: PNG, SVG or PDF file; missing folders are made.
      height, width: inches.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file can't be written.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path, data = Path(path), io.BytesIO()
    form = path.suffix.removeprefix(".").lower()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure
        undated = {} if form == "png" else {"metadata": {"Date" if form == "svg" else "CreationDate": None}}
        figure.savefig(data, format=form, **undated)
    write_bytes(path, data.getvalue())


def label_ends(axis: Any, ends: Sequence[tuple[float, str, str]], *, size: float = 8, gap: float = 1.25) -> None:
    """Writes labels on the right of an axis at the heights of their curves' ends, moved apart where they would overlap.

    Args:
      axis: with its final limits.
      ends: (height in data, text, colour) of each curve.
      size: of the letters, points.
      gap: least distance of two labels, in letters' heights.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    low, high = (axis.transData.transform((0, y))[1] for y in axis.get_ylim())
    least = gap * size * figure.dpi / 72 / (high - low)
    order = sorted(range(len(ends)), key=lambda i: ends[i][0])
    places = [(axis.transData.transform((1, ends[i][0]))[1] - low) / (high - low) for i in order]
    for i, place in zip(order, spread(places, least), strict=True):
        height, text, colour = ends[i]
        axis.annotate(
            text,
            (1.0, height),
            xycoords=axis.get_yaxis_transform(),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.6, shrinkA=1, shrinkB=0),
        )


def spread(places: Sequence[float], least: float) -> list[float]:
    """Sorted places moved apart to a least distance, each group around the mean of its own.

    >>> spread([0.0, 0.25, 1.0], 0.5)
    [-0.125, 0.375, 1.0]
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], least) < _start(groups[-2], least) + least * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [_start(group, least) + least * i for group in groups for i in range(len(group))]


def _start(group: Sequence[float], least: float) -> float:
    return sum(group) / len(group) - least * (len(group) - 1) / 2

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
SETTINGS: dict[Any, Any] = {
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
    "legend.handlelength": 3.2,
    "svg.hashsalt": "seer-jax",
}
LINES = ("-", "--", ":", "-.")
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # of what is no method, in order


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
        undated: dict[str, Any] = (
            {} if form == "png" else {"metadata": {"Date" if form == "svg" else "CreationDate": None}}
        )
        figure.savefig(data, format=form, **undated)
    write_bytes(path, data.getvalue())


class End(NamedTuple):
    """The end of a curve, in data, and what stands beside it."""

    x: float
    y: float
    text: str
    look: Look


def label_ends(axis: Any, ends: Sequence[End], *, title: str = "", size: float = 8, gap: float = 1.35) -> None:
    """Writes labels on the right of an axis at the heights of their curves' ends, moved apart where they would overlap.

    Args:
      axis: with its final limits.
      ends: of the curves.
      title: above the labels.
      size: of the letters, points.
      gap: least distance of two labels, in letters' heights.
    """
    axis.figure.draw_without_rendering()
    least = gap * size * axis.figure.dpi / 72 / axis.get_window_extent().height
    heights = [axis.transAxes.inverted().transform(axis.transData.transform(end[:2]))[1] for end in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    whole = dict(xycoords="axes fraction", fontsize=size, color=INK, annotation_clip=False)
    for i, place in zip(order, spread([heights[i] for i in order], least), strict=True):
        end = ends[i]
        # Grey and dotted, since a line of the method's colour would read as measured.
        line = dict(arrowstyle="-", color="0.6", linestyle=":", linewidth=0.8, shrinkA=0, shrinkB=2)
        axis.annotate("", end[:2], (1.03, place), textcoords="axes fraction", arrowprops=line, annotation_clip=False)
        mark = dict(color=end.look.colour, marker=end.look.marker, clip_on=False, transform=axis.transAxes)
        axis.plot([1.03], [place], **mark)
        axis.annotate(end.text, (1.045, place), va="center", **whole)
    if title:
        axis.annotate(title, (1.02, 1.03), **whole)


def spread(places: Sequence[float], least: float, top: float = 1.0) -> list[float]:
    """Sorted places moved apart to a least distance, each group around the mean of its own, none above the top.

    >>> spread([0.0, 0.25, 1.0], 0.5)
    [-0.125, 0.375, 1.0]
    """

    def start(group: Sequence[float]) -> float:
        return min(sum(group) / len(group) - least * (len(group) - 1) / 2, top - least * (len(group) - 1))

    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and start(groups[-1]) < start(groups[-2]) + least * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [start(group) + least * i for group in groups for i in range(len(group))]

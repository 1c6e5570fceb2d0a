"""Pictures of measurements."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pallas_kernels.bench import Measurement, hardware
from seer_jax.bench.table import beside_each_other

STYLES = ("-", "--", ":", "-.")
PANELS = {"decode kernel": "attention kernel", "decode layer": "one layer's attention", "decode model": "whole model"}


def check_matplotlib() -> None:
    """Raises ImportError with advice where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'seer-jax[plot]'.") from error


def plot_prefill(path: Path, measurements: Sequence[Measurement]) -> Path:
    """Writes a PNG: how many times faster than dense attention the kernel is, over the density and over the length.

    Raises:
      ValueError: no measurement has a dense time beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [m for m in measurements if m.table == "attention" and m.results.get("speedup") is not None]
    if not lines:
        raise ValueError(
            "The picture compares with dense attention, which no measurement has beside it; got none to draw."
        )
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    densities = sorted({m.settings["density"] for m in lines})
    lengths = sorted({m.settings["num_queries"] for m in lines})
    kinds = list(dict.fromkeys(_kind(m) for m in lines))
    kept = sorted(float(m.results["density"] or 1) for m in lines)
    left.plot(kept, [1 / d for d in kept], color="0.5", linewidth=1, label="ideal, 1 / share")
    for (length, kind), group in _grouped(lines, lambda m: (m.settings["num_queries"], _kind(m))).items():
        style = dict(color=f"C{lengths.index(length)}", linestyle=STYLES[kinds.index(kind) % len(STYLES)])
        left.plot(*_points(group, "density"), marker=".", label=f"{length} tokens, {kind}", **style)
    for (density, kind), group in _grouped(lines, lambda m: (m.settings["density"], _kind(m))).items():
        style = dict(color=f"C{densities.index(density)}", linestyle=STYLES[kinds.index(kind) % len(STYLES)])
        right.plot(*_points(group, "num_queries"), marker=".", label=f"{density:.0%}, {kind}", **style)
    left.set_xscale("log")
    left.set_xticks(densities, [f"{d:.0%}" for d in densities], minor=False)
    left.set_xlabel("share of the causal map's blocks")
    left.set_ylabel("times faster than dense attention")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, [str(n) for n in lengths], minor=False)
    right.set_xlabel("tokens")
    for axis in (left, right):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(hardware()["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plot_decode(path: Path, measurements: Sequence[Measurement]) -> Path:
    """Writes a PNG: how many times faster than dense kernel, layer and model are, over the length, a panel for each.

    Raises:
      ValueError: no measurement has a dense time beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [m for m in beside_each_other(measurements) if m.table in PANELS and m.results.get("speedup") is not None]
    lines = [m for m in lines if m.settings["density"] is not None]
    if not lines:
        raise ValueError(
            "The picture compares with dense attention, which no measurement has beside it; got none to draw."
        )
    tables = [name for name in PANELS if any(m.table == name for m in lines)]
    figure = Figure(figsize=(1 + 4.5 * len(tables), 4.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    lengths = sorted({m.settings["length"] for m in lines})
    batches = sorted({m.settings["batch"] for m in lines})
    for axis, table in zip(axes, tables, strict=True):
        panel = [m for m in lines if m.table == table]
        rules = list(dict.fromkeys(_rule(m) for m in panel))
        for (batch, rule), group in _grouped(panel, lambda m: (m.settings["batch"], _rule(m))).items():
            style = dict(color=f"C{batches.index(batch)}", linestyle=STYLES[rules.index(rule) % len(STYLES)])
            axis.plot(*_points(group, "length"), marker=".", label=f"batch {batch}, {rule}", **style)
        axis.axhline(1, color="0.5", linewidth=1)
        axis.set_title(PANELS[table])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        axis.set_xlabel("tokens")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("times faster than dense")
    figure.suptitle(hardware()["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _rule(m: Measurement) -> str:
    """How blocks are chosen, the same at every length."""
    rule = m.settings.get("rule") or "top"
    return f"{rule.split()[0]} {m.settings['density']:.0%}"


def _kind(m: Measurement) -> str:
    s = m.settings
    lists = "own lists" if s["lists"] == s["heads"] else "shared lists"
    return f"{s['block_size']}x{s['block_size']}, {lists}" + (f", {s['config']}" if s["config"] else "")


def _grouped(lines: Sequence[Measurement], key: Callable[[Measurement], tuple]) -> dict[tuple, list[Measurement]]:
    groups: dict[tuple, list[Measurement]] = {}
    for m in lines:
        groups.setdefault(key(m), []).append(m)
    return groups


def _points(group: Sequence[Measurement], name: str) -> tuple[list[float], list[float]]:
    """Abscissas, sorted, and speed-ups."""
    pairs = sorted(({**m.settings, **m.results}[name], m.results["speedup"] or 0.0) for m in group)
    return [x for x, _ in pairs], [y for _, y in pairs]

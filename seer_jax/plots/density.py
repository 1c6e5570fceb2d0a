"""Density per layer and head: which share of the blocks each head keeps under a policy, and the thresholds of those that have their own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from seer_jax.plots.style import INK, SHARES, WIDTH, drawing

WRITTEN = 16  # heads at most for a figure in each cell


@dataclasses.dataclass(frozen=True)
class HeadValues:
    """A value per layer and head.

    Attributes:
      title: what it is.
      values: `[L, heads]`.
      heads: what kind of heads.
      is_share: of the blocks, in [0, 1]; otherwise thresholds and masses, which have a scale of their own.
    """

    title: str
    values: Float[np.ndarray, "L heads"]
    heads: str = "head"
    is_share: bool = True


def policy_values(policy: Any, num_layers: int, heads: int) -> Float[np.ndarray, "L heads"] | None:
    """The values per layer and head that a policy holds (thresholds, masses); None where it has one value for all."""
    if not hasattr(policy, "per_head") or not any(np.ndim(getattr(policy, name)) for name in policy.per_head):
        return None
    (name,) = policy.per_head
    value = getattr(policy.stacked(num_layers, heads), name)
    return np.broadcast_to(np.asarray(value, np.float64), (num_layers, heads))


def plot_densities(path: Path, panels: Sequence[HeadValues], *, title: str = "") -> Path:
    """Writes a figure with a heat map `[L, heads]` per panel.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no panel.
    """
    if not panels:
        raise ValueError("A figure must have at least one panel; got none.")
    layers = max(len(panel.values) for panel in panels)
    from matplotlib.ticker import PercentFormatter

    with drawing(path, 1.4 + min(0.19 * layers, 8), width=min(WIDTH, 1.6 + 3.5 * len(panels))) as figure:
        widths = [max(4, panel.values.shape[1]) for panel in panels]
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        images = [_draw(axis, panel) for axis, panel in zip(axes, panels, strict=True)]
        # Shares have one scale; each kind of threshold has its own.
        shares = [n for n, panel in enumerate(panels) if panel.is_share]
        for group in [shares] * bool(shares) + [[n] for n in range(len(panels)) if n not in shares]:
            form = PercentFormatter(1, decimals=0) if group is shares else None
            bar = figure.colorbar(images[group[0]], ax=[axes[n] for n in group], format=form, pad=0.02, aspect=40)
            bar.outline.set_visible(False)
        axes[0].set_ylabel("layer")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return path


def _draw(axis: Any, panel: HeadValues) -> Any:
    """Draws a panel, and returns what its colour bar needs."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    values, positive = panel.values, panel.values[panel.values > 0]
    ratio = positive.max() / positive.min() if positive.size else 1.0
    norm = Normalize(0, 1) if panel.is_share else LogNorm() if ratio > 10 else Normalize()
    image = axis.imshow(values, cmap=SHARES, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_title(panel.title)
    axis.set_xlabel(panel.heads)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(False)
    written = panel.is_share and values.shape[1] <= WRITTEN
    for (layer, head), share in np.ndenumerate(values if written else np.empty((0, 0))):
        colour = "white" if share < 0.5 else INK
        axis.text(head, layer, f"{share:.0%}".rstrip("%"), ha="center", va="center", fontsize=6.5, color=colour)
    return image

"""A figure of block maps: the true map, the scorer's map and the kept blocks of some heads side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.plots.maps import BlockMaps
from seer_jax.plots.style import INK, WEIGHTS, drawing

FLOOR = 1e-3  # smallest weight that the colours tell from 0
KEPT = ("#ffffff", "#0072B2")  # dropped and kept blocks


def plot_block_maps(
    path: Path,
    maps: BlockMaps,
    heads: Sequence[tuple[int, int]],
    *,
    title: str = "",
    scorer: str = "gate",
    decode: bool = False,
) -> Path:
    """Writes a figure: one row per (layer, head), columns for the true map, the scorer's map and the kept blocks.

    Args:
      path: PNG, SVG or PDF file to write; its folder is made if need be.
      maps: of one text.
      heads: (layer, head) pairs; key/value heads while decoding.
      title: of the whole figure.
      scorer: its name in the heads of the columns.
      decode: whether the rows are tokens, not blocks of queries.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the model has no such head.
    """
    layers, per_layer = maps.true.shape[:2]
    if bad := [at for at in heads if not (0 <= at[0] < layers and 0 <= at[1] < per_layer)]:
        raise ValueError(f"heads must be (layer, head) with layer < {layers} and head < {per_layer}; got {bad[0]}.")
    with drawing(path, 2.75 * len(heads) + 0.5) as figure:
        axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
        for line, at in zip(axes, heads, strict=True):
            image = _draw_head(line, maps, at, decode)
        bar = figure.colorbar(image, ax=axes, format=_percent, pad=0.01, aspect=40, label="share of the row")
        bar.outline.set_visible(False)
        for axis, name in zip(axes[0], ("True map", f"Map of the {scorer}", "Kept blocks"), strict=True):
            axis.set_title(name)
        for axis in axes[-1]:
            axis.set_xlabel("key block")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return path


def _percent(share: float, _: Any) -> str:
    return f"{100 * share:g}%"


def _draw_head(axes: Any, maps: BlockMaps, at: tuple[int, int], decode: bool) -> Any:
    """Draws the three maps of a head, and returns what their colour bar needs."""
    from matplotlib.colors import ListedColormap, LogNorm

    true, scores, kept = (np.asarray(x[at]) for x in (maps.true, maps.scores, maps.kept))
    column, visible = np.arange(true.shape[1]), maps.visible[:, None]
    unscored = column >= visible - decode  # while decoding a token's own block is kept whatever it would score
    # Rows of tokens stand at their positions.
    bottom = len(true) if not decode else int(maps.last[-1]) + 1
    where = dict(extent=(0, true.shape[1], bottom, 0), aspect="auto", interpolation="nearest")
    for axis, values, hidden in zip(axes, (true, scores), (column >= visible, unscored), strict=False):
        shown = np.ma.masked_array(np.maximum(values, FLOOR), hidden)
        image = axis.imshow(shown, norm=LogNorm(FLOOR, 1), cmap=WEIGHTS, **where)
    axes[2].imshow(np.ma.masked_array(kept, column >= visible), cmap=ListedColormap(KEPT), vmin=0, vmax=1, **where)
    axes[2].text(
        0.97, 0.95, f"{float(maps.density[at]):.0%} kept", transform=axes[2].transAxes, ha="right", va="top", color=INK
    )
    head = "key/value head" if decode else "head"
    axes[0].set_ylabel(f"layer {at[0]}, {head} {at[1]}\n{'token' if decode else 'query block'}")
    for axis in axes:
        axis.grid(False)
    return image

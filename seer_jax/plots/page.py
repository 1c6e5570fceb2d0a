"""One self-contained HTML page to browse block maps by layer and head, without network or further files."""

import base64
import dataclasses
import gzip
import html
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from seer_jax.evaluate.levels import Phase
from seer_jax.outputs import write_text
from seer_jax.plots.maps import BlockMaps

FLOOR = 1e-4  # smallest share of a row that the page tells from 0
STEPS = 127  # from the floor to 1, 7.5% each: values are right within 3.7%, and bytes compress
LARGEST = 2**27  # cells of a page, 300 MB before compression: more than browsers take


@dataclasses.dataclass(frozen=True)
class PagePhase:
    """Maps of one phase.

    Attributes:
      phase: of which the rows are blocks of queries, or tokens.
      maps: of one text.
      policy, scorer: as readers know them.
      values: thresholds or masses of the policy per layer and head, where it has them, with `value_name`.
    """

    phase: Phase
    maps: BlockMaps
    policy: str
    scorer: str
    values: Float[np.ndarray, "L Hs"] | None = None
    value_name: str = "threshold"

    def to_json(self) -> dict[str, Any]:
        """What the page's script reads about the phase."""
        maps, decode = self.maps, self.phase is Phase.DECODE
        return {
            "name": self.phase.value,
            "policy": self.policy,
            "scorer": self.scorer,
            "layers": list(range(len(maps.density))),
            "heads": maps.true.shape[1],
            "columns": maps.true.shape[3],
            "last": np.asarray(maps.last).tolist(),
            "blockSize": maps.block_size,
            "density": np.round(maps.density, 5).tolist(),
            "rowWord": "token" if decode else "query block",
            "headWord": "key/value head" if decode else "head",
            "values": None if self.values is None else np.asarray(self.values, np.float64).tolist(),
            "valueWord": self.value_name,
        }

    def layer_bytes(self, layer: int) -> bytes:
        """A layer's visible cells: a byte each of the true map and of the scores, then a bit each of the kept blocks."""
        maps = self.maps
        seen = np.arange(maps.true.shape[3]) < maps.visible[:, None]
        true, scores, kept = (np.asarray(x[layer])[:, seen] for x in (maps.true, maps.scores, maps.kept))
        return b"".join(x.tobytes() for x in (quantize(true), quantize(scores), np.packbits(kept, bitorder="little")))


def quantize(shares: Float[np.ndarray, "*cells"]) -> UInt8[np.ndarray, "*cells"]:
    """Bytes of shares in [0, 1]: 0 below `FLOOR`, then 1 to `STEPS` + 1 in equal steps of the logarithm up to 1.

    >>> quantize(np.array([0.0, 1e-4, 0.1, 1.0])).tolist()
    [0, 1, 96, 128]
    """
    with np.errstate(divide="ignore"):
        steps = 1 + np.rint(STEPS * (1 - np.log(shares) / np.log(FLOOR)))
    return np.where(shares < FLOOR * (1 - 1e-6), 0, np.clip(steps, 1, STEPS + 1)).astype(np.uint8)


def write_page(path: Path, phases: Sequence[PagePhase], *, title: str, about: str = "") -> Path:
    """Writes the page. It works from disk (file://), in light and dark, by mouse and by keyboard.

    `#phase=decode&layer=2&head=1&row=5&column=3` behind its address chooses what is shown.

    Args:
      path: HTML file; missing folders are made.
      phases: prefill, decode, or both.
      title: of the page.
      about: a line below it: model, text, tokens.

    Raises:
      ValueError: there are no maps, or too many cells for a browser.
      OSError: the file can't be written.
    """
    cells = sum(int(phase.maps.visible.sum()) * np.asarray(phase.maps.density).size for phase in phases)
    if not 0 < cells <= LARGEST:
        raise ValueError(
            f"A page must have 1 to {LARGEST} cells, over all layers and heads; got {cells}. Lower `length`, or take one phase."
        )
    layers = [_script(phase, layer) for phase in phases for layer in range(len(phase.maps.density))]
    values = {"about": about, "floor": FLOOR, "steps": STEPS, "phases": [phase.to_json() for phase in phases]}
    # No text of the data may end its element: "<" is written as JSON's escape.
    data = json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "data": data, "layers": "\n".join(layers)}
    parts |= {"style": _viewer("style.css"), "script": _viewer("viewer.js")}
    first, *rest = _viewer("page.html").split("{{")
    pieces = [(parts[name], after) for name, _, after in (piece.partition("}}") for piece in rest)]
    write_text(path, first + "".join(part + after for part, after in pieces))
    return path


def _script(phase: PagePhase, layer: int) -> str:
    packed = base64.b64encode(gzip.compress(phase.layer_bytes(layer), mtime=0)).decode()
    return f'<script type="text/plain" id="{phase.phase.value}-{layer}">{packed}</script>'


def _viewer(name: str) -> str:
    return importlib.resources.files("seer_jax.plots").joinpath("viewer", name).read_text(encoding="utf-8")

"""The page of block maps as a file: all that it holds, nothing that it would have to fetch, and its size."""

import re
from pathlib import Path

import numpy as np
import pytest

from seer_jax.evaluate import Phase
from seer_jax.plots import BlockMaps, page, write_page
from seer_jax.plots.page import FLOOR, STEPS, PagePhase, quantize


def maps_of(layers: int, heads: int, rows: int) -> BlockMaps:
    rng = np.random.default_rng(0)
    seen = np.tri(rows, dtype=bool)
    # Weights as attention has them: most of a row's in few blocks, the others far below.
    true = np.where(seen, 10 ** rng.normal(-2.5, 1, (layers, heads, rows, rows)), 0).clip(0, 1).astype(np.float32)
    density = np.full((layers, heads), 0.2, np.float32)
    return BlockMaps(true, true, true > 0.01, density, np.arange(1, rows + 1) * 64 - 1, 64)


def test_bytes_are_equal_steps_of_the_logarithm():
    shares = np.array([1, 0.5, 0.1, 0.01, 1e-3, FLOOR])
    steps = quantize(shares).astype(float)
    np.testing.assert_allclose(FLOOR ** (1 - (steps - 1) / STEPS), shares, rtol=0.037)
    assert quantize(np.array([0, FLOOR / 2])).tolist() == [0, 0] and (np.diff(steps) < 0).all()


def test_a_page_needs_nothing_else(tmp_path: Path):
    phase = PagePhase(Phase.PREFILL, maps_of(2, 3, 5), "topk:0.1", "</script><b>")
    text = write_page(tmp_path / "new" / "page.html", [phase], title="<b>", about="&").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//[a-z]|\bsrc=|<link|@import|url\(|\bfetch\(|\bimport\b", text)
    assert "<b>" not in text.split('<script type="application/json"')[0].split("<title>")[1].split("</title>")[0]
    assert text.count("</script>") == 2 + 2 and "{{" not in text


def test_a_page_of_a_small_model_is_a_few_megabytes(tmp_path: Path):
    phase = PagePhase(Phase.PREFILL, maps_of(2, 9, 128), "topk:0.1", "gate")
    size = len(write_page(tmp_path / "page.html", [phase], title="x").read_bytes())
    assert 15 * size < 6e6  # 30 layers of 9 heads


@pytest.mark.parametrize("phases", [[], [PagePhase(Phase.PREFILL, maps_of(1, 1, 9), "x", "y")]])
def test_a_page_must_fit_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: list[PagePhase]):
    monkeypatch.setattr(page, "LARGEST", 40)
    with pytest.raises(
        ValueError, match=r"A page must have 1 to 40 cells, over all layers and heads; got (0|45)\. Lower `length`"
    ):
        write_page(tmp_path / "x.html", phases, title="x")

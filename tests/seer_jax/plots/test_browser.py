"""The page of block maps in a real browser, from disk: what it shows of every layer and head, by mouse, keys and address."""

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax.evaluate import Phase
from seer_jax.plots import BlockMaps, write_page
from seer_jax.plots.page import FLOOR, STEPS, PagePhase
from tests.browser import find_browser

pytestmark = pytest.mark.browser

BLOCK, LAYERS = 16, 3
STEP = FLOOR ** (-0.5 / STEPS)  # half a step of the page's bytes, as a ratio
WIDTH = 900  # pixels of the window


def random_maps(heads: int, last: np.ndarray, seed: int) -> BlockMaps:
    rng = np.random.default_rng(seed)
    columns = int(last[-1]) // BLOCK + 1
    shape = (LAYERS, heads, len(last), columns)
    seen = np.arange(columns) < (last // BLOCK + 1)[:, None]
    true, scores = (np.where(seen, 10 ** rng.uniform(-5, 0, shape), 0).astype(np.float32) for _ in range(2))
    kept = seen & (rng.uniform(size=shape) < 0.4)
    density = (kept.sum((2, 3)) / seen.sum()).astype(np.float32)
    return BlockMaps(true, scores, kept, density, last, BLOCK)


PHASES = {
    "prefill": PagePhase(Phase.PREFILL, random_maps(4, np.arange(1, 7) * BLOCK - 1, 0), "topk:0.4", "learned gate"),
    "decode": PagePhase(
        Phase.DECODE, random_maps(2, np.array([3, 20, 44, 70]), 1), "threshold:[3 x 2]", "gate", np.full((3, 2), 0.01)
    ),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "maps of <all> heads.html"
    return write_page(path, list(PHASES.values()), title="Maps of <all> heads", about="tiny, 96 tokens </script>")


def browse(page: Path, script: str, address: str = "", *options: str) -> tuple[dict[str, Any], str]:
    """What a script puts into `found` behind the page's own, which it may call, and the page as it then is."""
    copy = page.with_name("tried.html")
    tried = f"""<script>
    (async () => {{
      const found = {{}};
      while (!document.documentElement.dataset.state) await new Promise((done) => setTimeout(done, 10));
      {script}
      const place = document.body.appendChild(document.createElement("pre"));
      place.id = "found";
      place.textContent = JSON.stringify(found);
    }})();
    </script></body>"""
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", tried), encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    flags += [f"--window-size={WIDTH},800", *options, "--dump-dom", f"{copy.as_uri()}{address}"]
    browser = find_browser()
    assert browser is not None, "make browser installs one"
    done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found)), done.stdout


EVERY_HEAD = """
      found.said = [];
      for (let phase = 0; phase < data.phases.length; phase++)
        for (let layer = 0; layer < data.phases[phase].layers.length; layer++)
          for (let head = 0; head < data.phases[phase].heads; head++) {
            await show({ phase, layer, head });
            for (const [row, column] of [[0, 0], [3, 1], [2, 2], [1, 3]]) {
              await point(row, column);
              found.said.push([phase, layer, head, row, column, id("readout").textContent, id("summary").textContent]);
            }
          }
"""


def shares(text: str, names: list[str]) -> list[float]:
    """The percentages behind names; what is below the floor as 0."""
    found = [re.search(rf"{name} (below )?([\d.e-]+)%", text) for name in names]
    return [0.0 if match is None or match[1] else float(match[2]) / 100 for match in found]


def test_every_layer_and_head_shows_its_values(page: Path):
    found, dom = browse(page, EVERY_HEAD)
    assert 'data-state="ready"' in dom and "<title>Maps of &lt;all&gt; heads</title>" in dom
    assert len(found["said"]) == 4 * LAYERS * (4 + 2)
    for phase, layer, head, row, column, said, summary in found["said"]:
        one = list(PHASES.values())[phase]
        maps, at = one.maps, (layer, head, row, column)
        name = f"token {maps.last[row]}" if one.phase is Phase.DECODE else f"query block {row}"
        assert said.startswith(f"{name}, key block {column}: ")
        visible = column < maps.visible[row]
        own = one.phase is Phase.DECODE and column == maps.visible[row] - 1
        end = "kept" if maps.kept[at] else "dropped"
        assert said.endswith("comes later" if not visible else "own block" if own else end), said
        if visible:
            expected = [0.0 if x < FLOOR else x for x in (maps.true[at], 0.0 if own else maps.scores[at])]
            # Two digits are shown, which adds 5% at most.
            np.testing.assert_allclose(shares(said, ["true", one.scorer]), expected, rtol=STEP * 1.051 - 1)
        (kept,) = shares(summary, ["keeps"])
        assert kept == pytest.approx(maps.density[layer, head], rel=0.051)
        assert ("Its threshold is 0.0100." in summary) == (one.phase is Phase.DECODE)


BY_HAND = """
      const settled = () => new Promise((done) => setTimeout(done, 200));
      const now = () => `${location.hash} ${id("phase").value} ${id("layer").value} ${id("head").value}`;
      const key = async (name, target = document.body) => {
        target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
        await settled();
      };
      const mouse = async (target, type, x, y) => {
        const box = target.getBoundingClientRect();
        const at = { clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true };
        target.dispatchEvent(new PointerEvent(type, at));
        await settled();
      };
      found.address = [now(), id("readout").textContent];
      await key("ArrowDown"); await key("ArrowDown"); await key("ArrowDown"); await key("ArrowRight");
      found.keys = now();
      await key("p");
      found.p = now();
      await key("P");
      found.back = now();
      id("layer").value = 0;
      id("layer").dispatchEvent(new Event("change"));
      await settled();
      found.picked = now();
      await mouse(document.querySelector("#overview canvas"), "click", 0.9, 0.5);
      found.clicked = now();
      const kept = document.querySelector("[data-map=kept] canvas");
      await mouse(kept, "pointermove", 1.5 / 6, 3.5 / 6);
      found.pointed = id("readout").textContent;
      await key("ArrowUp", kept);
      found.moved = [id("readout").textContent, now()];
      location.hash = "#phase=prefill&layer=99&head=1&row=x&column=0";
      await settled();
      found.clamped = [now(), id("readout").textContent];
      found.pixels = [...kept.getContext("2d").getImageData(0, 0, 6, 6).data];
      found.colours = [themed("--kept"), themed("--dropped")];
      found.paper = getComputedStyle(document.body).backgroundColor;
      found.named = [...document.querySelectorAll("canvas")].map((one) => one.getAttribute("aria-label"));
      found.width = document.documentElement.scrollWidth;
"""


@pytest.mark.parametrize(
    ("options", "paper"), [((), "255, 255, 255"), (("--blink-settings=preferredColorScheme=0",), "22, 22, 24")]
)
def test_mouse_keys_pickers_and_address_choose_what_is_shown(page: Path, options: tuple[str, ...], paper: str):
    found, _ = browse(page, BY_HAND, "#phase=decode&layer=0&head=1&row=3&column=0", *options)
    assert found["address"][0] == "#phase=decode&layer=0&head=1 1 0 1"
    assert found["address"][1].startswith("token 70, key block 0: true ")
    assert found["keys"] == "#phase=decode&layer=2&head=1 1 2 1"  # the last layer and head are the end
    assert found["p"] == "#phase=prefill&layer=2&head=1 0 2 1" and found["back"] == found["keys"]
    assert found["picked"] == "#phase=decode&layer=0&head=1 1 0 1"
    assert found["clicked"] == "#phase=decode&layer=1&head=1 1 1 1"
    assert found["pointed"].startswith("token 44, key block 1: ")
    assert found["moved"][0].startswith("token 20, key block 1: ") and found["moved"][1] == found["clicked"]
    assert found["clamped"][0] == "#phase=prefill&layer=2&head=1 0 2 1"
    assert found["clamped"][1].startswith("query block 0, key block 0: ")
    colours = [[*colour, 255] for colour in found["colours"]]
    kept = PHASES["prefill"].maps.kept[2, 1]
    pixels = np.reshape(found["pixels"], (6, 6, 4)).tolist()
    for row, column in np.ndindex(6, 6):
        expected = [0, 0, 0, 0] if column > row else colours[0 if kept[row, column] else 1]
        assert pixels[row][column] == expected
    assert found["paper"] == f"rgb({paper})"
    assert len(found["named"]) == 6 and all(found["named"])
    assert found["width"] <= WIDTH


def test_a_page_that_cannot_be_read_says_so(page: Path):
    damaged = page.with_name("damaged.html")
    text = re.sub(r'(id="prefill-1">).*?(</script>)', r"\1AAAA\2", page.read_text(encoding="utf-8"))
    damaged.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match="CONSOLE"):  # the browser says it too
        browse(damaged, "", "#layer=1")
    _, dom = browse(damaged, "show({ layer: 1 }).catch(failed); await new Promise((done) => setTimeout(done, 500));")
    assert 'data-state="failed"' in dom
    assert re.search(
        r'<p id="problem" role="alert">The maps can\'t be shown: .+ Open the page in a current browser.</p>', dom
    )

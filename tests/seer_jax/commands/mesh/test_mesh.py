"""Commands with --mesh on four CPU devices: they write what they write on one, and refuse what a mesh can't do in one line."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from seer_jax import from_pretrained
from seer_jax.commands import main as cli
from seer_jax.evaluate.harness.adapter import load_harness_model

pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly", "unchecked")]

TEXT = "def main(argv):\n    return argv[1:]\n"
ROWS = "--length 128 --windows 3 --passkeys 3 --decoded 8 --batch-size 2"
# What runs, the file that holds its figures, and a mesh.
RUNS = {
    "eval": (f"eval GATES TEXT {ROWS} --methods gate --policies topk:0.5 --output OUT", "scores.json", "data=2,tensor=2"),
    "tasks": (
        "eval GATES --tasks vt --samples 2 --length 600 --methods gate --policies topk:0.5+budget:128 --no-chat --output OUT",
        "tasks.json",
        "tensor=4",
    ),
    "calibrate": (
        "calibrate GATES TEXT --length 128 --windows 3 --held-out-windows 3 --rule threshold --density 0.7 --output OUT",
        "calibration.json",
        "fsdp=4",
    ),
    "generate": ("generate GATES --prompt-file FILE --max-new-tokens 12 --report OUT/report.json", "report.json", "tensor=2"),
    "plot": ("plot maps GATES TEXT --length 128 --output OUT/maps.html", "maps.html", "tensor=4"),
}  # fmt: skip
OTHER = ("seconds", "started", "updated", "command", "mesh", "output", "report", "memory_bytes", "tokens_per_second")


def figures(value: Any, place: str = "") -> dict[str, Any]:
    """The leaves of JSON by their place, without times and what names the run."""
    if isinstance(value, dict):
        pairs = [(f"{place}.{name}", x) for name, x in value.items() if name not in OTHER]
    elif isinstance(value, list):
        pairs = [(f"{place}[{i}]", x) for i, x in enumerate(value)]
    else:
        return {place: value}
    return {name: leaf for where, x in pairs for name, leaf in figures(x, where).items()}


def ran(words: str, name: str, folder: Path, saved: Path) -> dict[str, Any]:
    """What a command writes."""
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text(TEXT * 200)
    (folder.parent / "prompt.txt").write_text(TEXT * 3)
    gates = f"--model {saved / 'base'} --gates {saved / 'prefill'} {saved / 'decode'}"
    for word, put in (
        ("GATES", gates),
        ("TEXT", f"--text {text}"),
        ("FILE", folder.parent / "prompt.txt"),
        ("OUT", folder),
    ):
        words = words.replace(word, str(put))
    assert cli.main(words.split()) == 0
    written = (folder / name).read_text(encoding="utf-8")
    if name.endswith(".html"):
        (written,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', written)
    return figures(json.loads(written))


@pytest.mark.slow
def test_verify_reads_a_model_onto_a_mesh(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Against logits of one device."""
    model, ids = from_pretrained(saved / "base", dtype="float32"), np.arange(96, dtype=np.int32).reshape(2, 48) % 61
    save_file({"input_ids": ids, "logits": np.asarray(jax.jit(lambda model: model(ids))(model))}, tmp_path / "logits")
    words = ["verify", "--model", str(saved / "base"), "--reference", str(tmp_path / "logits")]
    assert cli.main([*words, "--mesh", "data=2,tensor=2"]) == 0
    assert capsys.readouterr().out.startswith("PASS at 96 positions: relative error ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:4 devices of the mesh axis tensor share 2 key/value heads")
@pytest.mark.parametrize("run", RUNS)
def test_a_command_writes_on_a_mesh_what_it_writes_on_one_device(run: str, saved: Path, tmp_path: Path):
    words, name, mesh = RUNS[run]
    alone = ran(words, name, tmp_path / "alone", saved)
    spread = ran(f"{words} --mesh {mesh}", name, tmp_path / "spread", saved)
    assert alone.keys() == spread.keys() and len(alone) > 20
    for place, expected in alone.items():
        got = spread[place]
        if isinstance(expected, float):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=place)
        else:
            assert got == expected, place


@pytest.mark.slow
def test_lm_eval_requests_are_answered_on_a_mesh(saved: Path):
    """By the class that lm-evaluation-harness is given, with the mesh among the model's arguments."""
    arguments: dict[str, Any] = dict(
        gates=[str(saved / "prefill"), str(saved / "decode")], prefill="topk:0.5;dense_last_rows=0", decode="budget:32"
    )
    arguments |= dict(pretrained=str(saved / "base"), dtype="float32", max_length=128, batch_size=4)
    alone, spread = (load_harness_model(**arguments, mesh=mesh) for mesh in (None, "data=2;tensor=2"))
    assert spread.model.layout is not None
    pairs = [(TEXT * 2, " return"), ("import", " os\n"), ("", TEXT)]
    found = [
        (model.loglikelihood(pairs), model.generate_until([(TEXT, {"max_gen_toks": 6})])) for model in (alone, spread)
    ]
    (expected, text), (got, same) = found
    np.testing.assert_allclose([x.logprob for x in got], [x.logprob for x in expected], atol=1e-4)
    assert [x.is_greedy for x in got] == [x.is_greedy for x in expected] and text == same
    with pytest.raises(ValueError, match=r"got 'tensor' in 'tensor'\. Write for example data=2,tensor=2"):
        load_harness_model(**arguments, mesh="tensor")

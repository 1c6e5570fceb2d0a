"""`seer-jax train`: a run on a tiny model, and where its settings come from."""

import json
from pathlib import Path

import jax
import pytest

from seer_jax import from_pretrained
from seer_jax.commands import main as cli
from seer_jax.commands.train import starting_settings
from seer_jax.convert import load_gates

TEXT = "def main():\n    # three birds: 🦜🦜🦜\n" * 80

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_training_leaves_gates_that_can_be_used(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    size = dict(block_size=16, gate_dim=16)
    settings = dict(
        model=str(saved / "base"),
        output=str(tmp_path / "run"),
        gates="both",
        data=dict(paths=[str(text)]),
        prefill=size,
        decode=size,
        sequence_length=64,
        batch_size=2,
        steps=99,
        optimizer=dict(warmup_steps=0),
        precision="float32",
        tensorboard=False,
    )
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert cli.main(["train", "--config", str(tmp_path / "run.json"), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 2/2" in out
    gates = f"--gates {tmp_path}/run/prefill_gate {tmp_path}/run/decode_gate"
    policies = "--prefill topk:0.1 --decode topk:0.1"
    assert f"Use them: seer-jax generate --model {saved}/base {gates} {policies} --prompt" in out
    config = from_pretrained(saved / "base").config
    for kind in ("prefill", "decode"):
        gate = load_gates(tmp_path / "run" / f"{kind}_gate", config)
        assert gate.config.block_size == 16 and gate.config.gate_dim == 16
        fresh = load_gates(saved / kind)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(gate), jax.tree.leaves(fresh), strict=True))


def test_the_recipes_are_where_training_starts():
    default, rest = starting_settings(["--steps", "7", "--recipe", "decode"])
    assert default.sequence_length == 32768 and default.gates.value == "decode" and rest == ["--steps", "7"]
    assert starting_settings([])[0].sequence_length == 65536

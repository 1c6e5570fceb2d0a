"""`seer-jax train`: a run on a tiny model, and where its settings come from."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import pytest

from seer_jax import from_pretrained
from seer_jax.commands import main as cli
from seer_jax.commands.train import starting_options
from seer_jax.convert import load_gates

TEXT = "def main():\n    # three birds: 🦜🦜🦜\n" * 80

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def trained(saved: Path, tmp_path_factory: pytest.TempPathFactory, compile_quickly: None) -> Path:
    """The folder of a run of two steps, whose settings came from a file with relative paths."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text(TEXT)
    size = dict(block_size=16, gate_dim=16)
    settings = dict(
        model=str(saved / "base"),
        output="run",
        kind="both",
        data=dict(paths="text.txt"),
        prefill=size,
        decode=size,
        sequence_length=64,
        batch_size=2,
        steps=99,
        dtype="float32",
        tensorboard=False,
    )
    (root / "run.json").write_text(json.dumps(settings))
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["train", "--config", "run.json", "--steps", "2"]) == 0
    (root / "run" / "out").write_text(out.getvalue())
    return root / "run"


def test_training_leaves_gates_that_can_be_used(saved: Path, trained: Path):
    out = (trained / "out").read_text()
    stages = [
        f"Loading {saved}/base ...",
        "Reading training text ...",
        "Training data:",
        "Compiling the training step ...",
        "step 2/2",
    ]
    assert [out.index(stage) for stage in stages] == sorted(out.index(stage) for stage in stages)
    gates = f"--gates {trained}/prefill_gate {trained}/decode_gate"
    policies = "--prefill topk:0.1 --decode topk:0.1"
    assert f"Use them: seer-jax generate --model {saved}/base {gates} {policies} --prompt" in out
    config = from_pretrained(saved / "base").config
    for kind in ("prefill", "decode"):
        gate = load_gates(trained / f"{kind}_gate", config)
        assert gate.config.block_size == 16 and gate.config.gate_dim == 16
        fresh = load_gates(saved / kind)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(gate), jax.tree.leaves(fresh), strict=True))


def test_a_run_goes_on_from_any_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert json.loads((trained / "config.json").read_text())["data"]["paths"] == [str(trained.parent / "text.txt")]
    assert cli.main(["train", "--config", str(trained / "config.json")]) == 0
    assert "Resuming after step 2." in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_recipes_are_where_training_starts():
    decode = starting_options(["--steps", "7", "--recipe", "decode"])
    assert decode.sequence_length == 32768 and decode.kind.value == "decode" and decode.steps == 800
    assert starting_options([]).sequence_length == 65536


def test_all_options_are_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for option in (
        "--config",
        "--recipe",
        "--initial-gates",
        "--steps",
        "--data.held-out-rows",
        "--optimizer.warmup-steps",
        "--prefill.q-pool-size",
        "--decode.k-pool-size",
        "--decode.heads",
    ):
        assert f"{option} " in out


REFUSED = [
    (
        ["--steps", "1"],
        r"train: --steps must be at least the 2 that this run has done, of 2; got 1\. Set --steps 2 or more, or give another --output",
    ),
    (
        ["--seed", "3"],
        r"train: --seed: this run was started with 0; got 3\. Restore --seed 0 to go on with the run in .*, or give another --output for a",
    ),
    (
        ["--optimizer.learning-rate", "0.5"],
        r"--optimizer\.learning-rate: .*; got 0\.5\. Restore --optimizer\.learning-rate 0\.001 to go on",
    ),
    (
        ["--prefill.gate-dim", "64"],
        r"train: --prefill\.gate-dim: this run was started with 16; got 64\. Restore --prefill\.gate-dim 16 to go on",
    ),
    (
        ["--data.paths", "/x.txt"],
        r"--data\.paths: this run was started with \[.*\]; got \['/x\.txt'\]\. Restore --data\.paths to go on",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_a_run_cannot_go_on_with(
    trained: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["train", "--config", str(trained / "config.json"), *words]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.filterwarnings("always")
def test_settings_of_a_gate_that_is_not_trained_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--kind", "prefill", "--model", "/absent", "--output", str(tmp_path / "run")]
    assert cli.main(["train", *words, "--decode.gate-dim", "64"]) == 1
    assert "--decode-skip change nothing, as --kind prefill trains no decode gate." in capsys.readouterr().err
    assert cli.main(["train", *words, "--prefill.gate-dim", "64"]) == 1
    assert "change nothing" not in capsys.readouterr().err

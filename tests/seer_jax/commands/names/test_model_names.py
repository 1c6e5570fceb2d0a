"""Gates know their base model, and commands use what they know."""

import json
from pathlib import Path

import pytest

from seer_jax import tiny_lm
from seer_jax.commands import main as cli
from seer_jax.commands.arguments import model_of
from seer_jax.convert import base_model
from seer_jax.models.hub import named_gates

PREFILL, DECODE = (str(folder) for folder in named_gates("tiny-lm").values())


def gate_of(folder: Path, name: str) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"base_model": name}))
    return str(folder)


CASES = [
    (None, [], "tiny-lm", ""),
    (None, ["tiny-lm"], "tiny-lm", ""),
    ("./x", [], "./x", ""),
    (None, ["@owner/name"], "owner/name", "model: owner/name (base model of the gates)\n"),
    ("owner/name", ["@owner/name"], "owner/name", ""),
    ("/models/Name", ["@owner/name"], "/models/Name", ""),
    ("owner/name@v2", ["@owner/name"], "owner/name@v2", ""),
    (str(tiny_lm.path()), ["tiny-lm"], str(tiny_lm.path()), ""),
    ("owner/x", ["@owner/name"], "owner/x", "model: owner/x, but the gates name owner/name as their base model\n"),
    (None, ["@"], "tiny-lm", ""),
]


@pytest.mark.parametrize(("model", "gates", "chosen", "said"), CASES)
def test_the_base_model_of_a_command(
    model: str | None, gates: list[str], chosen: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A gate "@NAME" is one that names NAME."""
    folders = [gate_of(tmp_path / "gate", gate[1:]) if gate.startswith("@") else gate for gate in gates]
    assert model_of(model, folders, {}) == chosen
    assert capsys.readouterr() == ("", said)


def test_gates_of_two_models_do_not_belong_together(tmp_path: Path):
    gates = [gate_of(tmp_path / name, name) for name in ("a/x", "a/y")]
    with pytest.raises(ValueError, match=r"Gates must be of one base model; got 'a/x' \(.*x\), 'a/y' \(.*y\)\. Choose"):
        base_model(gates)


def test_a_base_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gate = gate_of(tmp_path / "gate", "runs/gone/x")
    assert cli.main(["generate", "--gates", gate, "--prompt", "x"]) == 1
    message = (
        "seer-jax generate: The gates name the base model 'runs/gone/x', which is not there. Give --model ... too.\n"
    )
    assert capsys.readouterr().err == message

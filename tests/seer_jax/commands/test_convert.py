"""`seer-jax convert` and `seer-jax verify`."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seer_jax import from_pretrained, tiny_lm
from seer_jax.commands import main as cli
from seer_jax.commands.convert import ConvertConfig, convert
from seer_jax.convert import GateFormat, load_base, load_gates, recommended_policy, save_base
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import DType
from seer_jax.selection.rules import Threshold
from tests.convert.test_gates import assert_same
from tests.golden.data import release, transformers_case, write_base, write_gates

LLAMA, PREFILL = "llama_llama3", "prefill_llama_a"

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.mark.parametrize("format", list(GateFormat))
def test_gates_change_their_format_and_nothing_else(format: GateFormat, tmp_path: Path):
    told = dict(seer_jax_training={"step": 8}, seer_jax_calibration={"density": 0.25})
    source = write_gates(tmp_path / "a", PREFILL, **told)
    path = convert(ConvertConfig(tmp_path / "b", str(source), format))
    assert path == tmp_path / "b" / f"attn_gate_weights.{format}"
    assert_same(load_gates(source), load_gates(tmp_path / "b"))
    assert recommended_policy(tmp_path / "b") == Threshold(0.05)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["base_model"] == "authors/base" and told.items() <= written.items()


def test_one_folder_can_hold_base_and_gates(tmp_path: Path):
    base = write_base(tmp_path / "base", release(PREFILL))
    (base / "tokenizer.json").write_text("{}")
    (base / "notes.txt").touch()
    gates = write_gates(tmp_path / "gates", PREFILL)
    convert(ConvertConfig(tmp_path / "both", str(gates), model=str(base), include_base=True))
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == [
        "attn_gate_weights.safetensors",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert load_file(tmp_path / "both" / "model.safetensors").keys() == release(PREFILL).base.keys()
    model = load_base(tmp_path / "both").attach(load_gates(tmp_path / "both"))
    assert isinstance(model.prefill_gate, PrefillGate)
    assert model.prefill_gate.config == PrefillGateConfig(gate_dim=64)
    assert json.loads((tmp_path / "both" / "config.json").read_text())["base_model"] == str(base)


def test_a_model_that_is_overwritten_leaves_no_weights(tmp_path: Path):
    base, gates = write_base(tmp_path / "base", release(PREFILL)), write_gates(tmp_path / "gates", PREFILL)
    model, both = load_base(base, dtype=DType.FLOAT32), tmp_path / "both"
    save_base(jax.tree.map(lambda x: x + 1, model), both, shard_bytes=20_000)
    convert(ConvertConfig(both, str(gates), model=str(base), include_base=True, force=True))
    assert_same(load_base(both, dtype=DType.FLOAT32), model)
    assert not list(both.glob("model-*")) and not list(both.glob("*.index.json"))


def test_gates_are_checked_against_the_base(tmp_path: Path):
    base = write_base(tmp_path / "base", transformers_case(LLAMA))
    gates = write_gates(tmp_path / "gates", PREFILL)
    with pytest.raises(ValueError, match="head_dim must be 8; got 64"):
        convert(ConvertConfig(tmp_path / "out", str(gates), model=str(base)))
    assert not (tmp_path / "out").exists()


def test_gates_in_half_the_size(tmp_path: Path):
    gates = write_gates(tmp_path / "gates", PREFILL)
    path = convert(ConvertConfig(tmp_path / "out", str(gates), dtype=DType.BFLOAT16))
    assert {a.dtype for a in load_file(path).values()} == {np.dtype(jnp.bfloat16)}


def test_what_is_read_is_not_written(tmp_path: Path):
    gates = write_gates(tmp_path / "gates", PREFILL)
    with pytest.raises(ValueError, match=r"output must differ from the folders that are read; got .*gates\. Choose"):
        convert(ConvertConfig(tmp_path / "x" / ".." / "gates", str(gates)))
    base = write_base(tmp_path / "base", release(PREFILL))
    with pytest.raises(ValueError, match=r"output must differ from the folders that are read; got .*base\. Choose"):
        convert(ConvertConfig(base, str(gates), model=str(base)))


def test_nothing_is_overwritten_unasked(tmp_path: Path):
    """Neither a gate nor, by the second gate of a model, the base beside it."""
    base = write_base(tmp_path / "base", release(PREFILL))
    gates, out = str(write_gates(tmp_path / "gates", PREFILL)), tmp_path / "out"
    settings = [dict(), dict(model=str(base)), dict(model=str(base), include_base=True)]
    convert(ConvertConfig(out, gates, **settings[2]))
    for config in (ConvertConfig(out, gates, GateFormat.SAFETENSORS, **extra) for extra in settings):
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        with pytest.raises(
            FileExistsError, match=r"output must not hold .* has config\.json, attn_gate_weights\.safetensors"
        ):
            convert(config)
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
        convert(dataclasses.replace(config, force=True))
    torch = ConvertConfig(out, gates, GateFormat.TORCH)
    with pytest.raises(FileExistsError, match=r"has config\.json, attn_gate_weights\.safetensors\. .* with force=True"):
        convert(torch)
    convert(dataclasses.replace(torch, force=True))
    assert [path.name for path in out.glob("attn*")] == ["attn_gate_weights.pth"]
    (out / "attn_gate_weights.pth").unlink()
    with pytest.raises(FileExistsError, match=r"has config\.json, model\.safetensors\. Choose another folder"):
        convert(ConvertConfig(out, gates, **settings[2]))
    with pytest.raises(NotADirectoryError, match="must be a folder; got the file"):
        convert(ConvertConfig(out / "config.json", gates))


def test_the_base_that_is_included_is_the_one_that_the_gates_name(saved: Path, tmp_path: Path):
    gates = tmp_path / "gates"
    shutil.copytree(saved / "decode", gates)
    hf = json.loads((gates / "config.json").read_text())
    for name in ("", str(saved / "base")):
        (gates / "config.json").write_text(json.dumps(hf | {"base_model": name}))
        if name:
            convert(ConvertConfig(tmp_path / "out", str(gates), include_base=True))
            assert (tmp_path / "out" / "model.safetensors").is_file()
        else:
            with pytest.raises(
                ValueError, match=r"include_base must come with the model to copy, and the gates name none"
            ):
                convert(ConvertConfig(tmp_path / "out", str(gates), include_base=True))


def test_convert_and_verify(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gates = ["convert", "--gates", str(saved / "decode"), "--output", str(tmp_path / "pth"), "--format", "pth"]
    assert cli.main(gates) == 0
    assert capsys.readouterr().out == f"{tmp_path}/pth/attn_gate_weights.pth\n"
    again, before = load_gates(tmp_path / "pth"), load_gates(saved / "decode")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)

    model = from_pretrained(saved / "base", dtype=jnp.float32)
    ids = np.arange(20, dtype=np.int32)[None]
    logits = np.asarray(model(jnp.asarray(ids)))
    for name, factor, code in (("good", 1.0, 0), ("bad", 1.01, 1)):
        save_file(dict(input_ids=ids, logits=logits * np.float32(factor)), tmp_path / name)
        words = ["verify", "--model", str(saved / "base"), "--reference", str(tmp_path / name)]
        assert cli.main(words) == code
        assert ("PASS" if code == 0 else "FAIL") in capsys.readouterr().out


def test_the_bundled_model_has_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its name stands for two gates, of which one must be named."""
    words = ["verify", "--model", "tiny-lm", "--reference", str(tiny_lm.path() / "logits_check.safetensors")]
    assert cli.main(words) == 0 and "PASS" in capsys.readouterr().out
    assert cli.main(["convert", "--gates", "tiny-lm", "--output", str(tmp_path / "out")]) == 1
    assert "A single gate must be named" in capsys.readouterr().err

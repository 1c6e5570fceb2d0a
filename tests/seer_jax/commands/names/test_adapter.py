"""Every command that takes a model takes an adapter for it, in one way."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from seer_jax import from_pretrained
from seer_jax.commands import main as cli
from seer_jax.commands.arguments import AdapterOptions, model_of
from seer_jax.commands.calibrate import CalibrateConfig
from seer_jax.commands.convert import ConvertConfig
from seer_jax.commands.eval import EvalConfig
from seer_jax.commands.generate import GenerateConfig
from seer_jax.commands.plan import PlanConfig
from seer_jax.commands.plot.configs import TextPlot
from seer_jax.commands.verify import VerifyConfig
from seer_jax.convert import load_base, save_adapter
from seer_jax.lora import LoraConfig, adapted, add_lora, linears_of, merge_lora
from seer_jax.sharding import make_mesh


@pytest.fixture(scope="session")
def run(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that trained an adapter with another RoPE, beside the base model: config.json and adapter/."""
    root, model = tmp_path_factory.mktemp("run"), load_base(saved / "base")
    rope = dataclasses.replace(model.config.rope, factor=4.0)
    model.use_rope(dataclasses.replace(model.config, rope=rope))
    add_lora(model, LoraConfig(2, 8.0, ("q_proj", "o_proj")))
    rng = np.random.default_rng(0)
    for lora in adapted(model).values():
        lora.b.set_value(jnp.asarray(rng.normal(size=lora.b.shape), jnp.float32))
    save_adapter(model, root / "adapter", base_model=saved / "base")
    (root / "config.json").write_text(json.dumps({"optimizer": {}, "sequence_length": 64}))
    return root


@pytest.fixture(scope="session")
def damaged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a wider model."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "adapter_config.json").write_text((run / "adapter" / "adapter_config.json").read_text())
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_{kind}.weight": np.zeros((2, 2), np.float32) for kind in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


CONFIGS = [GenerateConfig, EvalConfig, CalibrateConfig, TextPlot, VerifyConfig, PlanConfig, ConvertConfig]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_option_is_the_same_everywhere(kind: type):
    assert issubclass(kind, AdapterOptions) and {"model", "adapter"} <= {f.name for f in dataclasses.fields(kind)}


COMMANDS = [
    "generate --prompt x",
    "generate --prompt x --plan",
    "eval --gates {gates}",
    "eval --gates {gates} --tasks niah_single_1",
    "calibrate --gates {gates}",
    "plot maps --gates {gates} --output {out}/maps.html",
    "verify --reference {out}/none.safetensors",
    "plan",
    "convert --output {out}/model",
    "train --output {out}/run --data.paths {out}",
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_model_is_refused_in_one_line(
    command: str, saved: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text.txt").write_text("word " * 99)
    words = command.format(gates=saved / "prefill", out=tmp_path).split()
    assert cli.main([*words, "--model", str(saved / "base"), "--adapter", str(damaged)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"The adapter {damaged} must fit the base model {saved / 'base'}: " in last
    assert "missing: base_model.model.model.layers.1" in last


@pytest.fixture(scope="session")
def merged(saved: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `convert` writes."""
    words = ["convert", "--model", str(saved / "base"), "--adapter", str(run), "--dtype", "float32", "--output"]
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert cli.main([*words, str(folder)]) == 0
    return folder


def test_a_converted_model_has_the_weights_and_the_rope_of_its_adapter(saved: Path, run: Path, merged: Path):
    expected = merge_lora(from_pretrained(saved / "base", adapter=run, dtype="float32"))
    got = from_pretrained(merged, dtype="float32")
    assert got.config.rope == expected.config.rope and got.config.rope.factor == 4
    for path, linear in linears_of(expected).items():
        np.testing.assert_array_equal(linears_of(got)[path].weight[...], linear.weight[...])


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked", "compile_quickly")
def test_generation_with_an_adapter_is_that_of_the_merged_model(
    saved: Path, run: Path, merged: Path, capsys: pytest.CaptureFixture[str]
):
    """Base model and RoPE are taken from the adapter."""
    words = ["--prompt", "def f(x):", "--max-new-tokens", "4", "--dtype", "float32"]
    assert cli.main(["generate", "--adapter", str(run), *words]) == 0
    told = capsys.readouterr()
    assert f"model: {saved / 'base'} (base model of the adapter)" in told.err
    assert cli.main(["generate", "--model", str(merged), *words]) == 0
    assert capsys.readouterr().out == told.out


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_shapes_of_a_model_have_its_adapter(mesh: str | None, saved: Path, run: Path):
    """Memory is planned with it, on a mesh as it will lie there."""
    made = None if mesh is None else make_mesh(mesh)
    shapes, model = (
        from_pretrained(saved / "base", adapter=run, mesh=made, abstract=abstract) for abstract in (True, False)
    )
    assert len(adapted(shapes)) == 2
    for path, lora in adapted(model).items():
        planned = adapted(shapes)[path]
        assert (planned.a.shape, planned.b.shape) == (lora.a.shape, lora.b.shape)
        assert mesh is None or planned.b.get_value().sharding == lora.b.get_value().sharding
    assert shapes.config == model.config and not adapted(merge_lora(model))


def test_an_adapter_names_the_model_before_gates_do(run: Path, saved: Path, capsys: pytest.CaptureFixture[str]):
    assert model_of(None, ["tiny-lm"], {}, str(run)) == str(saved / "base")
    assert model_of("owner/x", [], {}, str(run / "adapter")) == "owner/x"
    told = f"model: owner/x, but the adapter names {saved / 'base'} as its base model\n"
    assert capsys.readouterr().err.endswith(told)


def test_a_merged_adapter_comes_without_gates(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["convert", "--gates", "x", "--output", "y", "--adapter", "z"]) == 2
    assert "--adapter must come without --gates, as it is merged" in capsys.readouterr().err

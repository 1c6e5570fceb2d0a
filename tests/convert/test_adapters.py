"""LoRA adapters in the layout of PEFT: names, shapes and scale as PEFT defines them, round trips, refusals."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from seer_jax import from_pretrained
from seer_jax.convert import load_adapter, load_base, save_adapter, save_base
from seer_jax.lora import LoraConfig, adapted, add_lora, lora_config
from seer_jax.models.config import RopeConfig
from seer_jax.models.families import config_to_hf
from seer_jax.models.layers import LoraParam
from seer_jax.sharding import make_mesh
from tests.train.tiny import CONFIG, make_model

LORA = LoraConfig(3, 12.0, ("q_proj", "v_proj", "down_proj"))
PARTS = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base` and `adapter`, and `merged`, the model that has the adapter in its weights."""
    root, model = tmp_path_factory.mktemp("adapters"), make_model()
    save_base(model, root / "base")
    add_lora(model, LORA)
    rng = np.random.default_rng(1)
    for lora in adapted(model).values():
        lora.b.set_value(jnp.asarray(rng.normal(size=lora.b.shape), jnp.float32))
    save_adapter(model, root / "adapter", base_model=root / "base")
    save_base(model, root / "merged")
    return root


def test_names_and_shapes_are_those_of_peft(saved: Path):
    config, tensors = (
        json.loads((saved / "adapter" / "adapter_config.json").read_text()),
        load_file(saved / "adapter" / "adapter_model.safetensors"),
    )
    expected = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=3, lora_alpha=12, target_modules=list(LORA.targets), bias="none"
    )
    assert expected | dict(base_model_name_or_path=str(saved / "base")) == {
        key: config[key] for key in (*expected, "base_model_name_or_path")
    }
    sizes = dict(q_proj=(32, 64), v_proj=(32, 32), down_proj=(32, 32))  # inputs, outputs
    assert {key: (x.shape, str(x.dtype)) for key, x in tensors.items()} == {
        f"{PREFIX}.{layer}.{PARTS[name]}.{name}.{kind}.weight": (shape, "float32")
        for layer in range(CONFIG.num_layers)
        for name, (inputs, outputs) in sizes.items()
        for kind, shape in (("lora_A", (3, inputs)), ("lora_B", (outputs, 3)))
    }


def test_merged_weights_are_those_that_peft_defines(saved: Path):
    """W + lora_alpha / r * B A, and nothing else changes."""
    base, merged = (load_file(saved / name / "model.safetensors") for name in ("base", "merged"))
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    for key, weight in base.items():
        a, b = (
            tensors.get(f"base_model.model.{key.removesuffix('weight')}{kind}.weight") for kind in ("lora_A", "lora_B")
        )
        expected = weight if a is None or b is None else weight + 12 / 3 * b @ a
        np.testing.assert_allclose(merged[key], expected, atol=1e-5, rtol=0, err_msg=key)


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_an_adapter_comes_back_bit_for_bit(saved: Path, mesh: str | None, tmp_path: Path):
    made = None if mesh is None else make_mesh(mesh)
    model = from_pretrained(saved / "base", adapter=saved / "adapter", dtype="float32", mesh=made)
    assert lora_config(model) == LORA and len(jax.tree.leaves(nnx.state(model, LoraParam))) == 6
    save_adapter(model, tmp_path, base_model=saved / "base")
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved / "adapter" / name).read_bytes()


def test_rank_stabilised_adapters_have_their_scale(saved: Path, tmp_path: Path):
    model = load_adapter(
        changed(saved, tmp_path, use_rslora=True, init_lora_weights="gaussian", modules_to_save=[]),
        load_base(saved / "base"),
    )
    (scale,) = {lora.scale for lora in adapted(model).values()}
    assert scale == pytest.approx(12 / math.sqrt(3))


def test_a_model_takes_the_rope_of_its_adapter(saved: Path, tmp_path: Path):
    model = make_model()
    model.use_rope(model.config.with_yarn(4))
    save_adapter(add_lora(model, LORA), tmp_path, base_model=saved / "base")
    loaded = from_pretrained(saved / "base", adapter=tmp_path)
    assert loaded.config.rope == model.config.rope and loaded.config.context == 4 * 8192


def changed(saved: Path, folder: Path, tensors: Any = None, **settings: Any) -> Path:
    """A copy of the adapter with other settings, and with tensors that a function changes."""
    values = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    arrays = load_file(saved / "adapter" / "adapter_model.safetensors")
    save_file(arrays if tensors is None else tensors(arrays), folder / "adapter_model.safetensors")
    return folder


KEY = f"{PREFIX}.1.mlp.down_proj.lora_A.weight"
DAMAGED: list[tuple[dict[str, Any], str]] = [
    (dict(peft_type="IA3"), r"peft_type must be 'LORA'; got 'IA3'"),
    (dict(use_dora=True), r"use_dora must be False or absent; got True\. Merge the adapter with PEFT"),
    (dict(modules_to_save=["lm_head"]), r"modules_to_save must be None or absent; got \['lm_head'\]"),
    (dict(rank_pattern={"q_proj": 8}), r"rank_pattern must be \{\} or absent"),
    (dict(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens must be None or absent; got \[1, 2\]\. Merge the adapter"),
    (dict(use_bdlora={"nblocks": 2}), r"use_bdlora must be None or absent; got \{'nblocks': 2\}"),
    (dict(use_rslora="no"), r"adapter_config\.json: use_rslora must be true or false; got 'no'\. Save"),
    (dict(use_qalora=True), r"use_qalora must be False or absent; got True"),
    (dict(init_lora_weights="pissa_niter_4"), r"init_lora_weights must be one that leaves the base weights .*; got 'pissa_niter_4'\. Merge"),
    (dict(init_lora_weights=["olora"]), r"init_lora_weights must be .*; got \['olora'\]"),
    (dict(r=0), r"r and lora_alpha must be positive; got 0 and 12"),
    (dict(lora_alpha="12"), r"lora_alpha must be a finite number; got '12'\. Save the adapter again"),
    (dict(r=4), r"shapes must be those .* \(3, 32\) instead of \(4, 32\)"),
    (dict(tensors=lambda x: {k: v for k, v in x.items() if k != KEY}), rf"missing: {re.escape(KEY)}; left over: none"),
    (dict(tensors=lambda x: x | {"other": x[KEY]}), r"left over: other"),
    (dict(tensors=lambda x: {"other": x[KEY]}), r"must have tensors such as base_model\.model"),
    (dict(tensors=lambda x: x | {KEY: x[KEY] * np.nan}), r"weights must be finite in float32"),
    (dict(tensors=lambda x: {k.replace("q_proj", "wq"): v for k, v in x.items()}), r"linear maps of the model's layers: .*; got wq"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_other_adapters_are_refused(saved: Path, changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_adapter(changed(saved, tmp_path, **changes), make_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(rope=RopeConfig(theta=1e6)),
            r"must have rope_theta=10000\.0; got rope_theta=1000000\.0\. Take the adapter's",
        ),
        (dict(num_layers=3, rms_norm_eps=1e-5), r"must have num_layers=2, rms_norm_eps=1e-06; got num_layers=3, rms"),
    ],
)
def test_an_adapter_of_another_model_of_the_same_shapes_is_refused(
    saved: Path, changes: dict[str, Any], message: str, tmp_path: Path
):
    changed(saved, tmp_path)
    other = config_to_hf(dataclasses.replace(CONFIG, **changes))
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, make_model())


def test_an_adapter_may_be_named_by_its_file(saved: Path):
    model = load_adapter(saved / "adapter" / "adapter_model.safetensors", make_model())
    assert lora_config(model) == LORA


def test_models_have_names_and_adapters_have_none():
    with pytest.raises(FileNotFoundError, match=r"no folder 'tiny-lm', .* or use a hub id\.$"):
        load_adapter("tiny-lm", make_model())


def test_a_folder_without_an_adapter_is_refused(saved: Path, tmp_path: Path):
    with pytest.raises(
        FileNotFoundError,
        match=r"adapter_model\.safetensors; .* has no adapter_config\.json and no .* but \['config\.json",
    ):
        load_adapter(saved / "base", make_model())
    with pytest.raises(ValueError, match=r"must carry an adapter to save; it has none"):
        save_adapter(make_model(), tmp_path, base_model="x/y")

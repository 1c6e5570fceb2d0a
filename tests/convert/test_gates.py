"""Gate checkpoints: the release's layout in and out, bit for bit, and every misfit refused."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from seer_jax.convert import GateFormat, load_gates, recommended_policy, save_gates
from seer_jax.convert.formats.torch_zip import read_torch_zip, write_torch_zip
from seer_jax.convert.gate_config import (
    gate_config_from_hf,
    gate_config_to_hf,
    parse_key_pooling,
    parse_prefill_pooling,
)
from seer_jax.convert.gates import abstract_gate, recommend
from seer_jax.gates.configs import (
    DecodeGateConfig,
    GateConfig,
    HeadJoin,
    Join,
    Pool,
    PrefillGateConfig,
    QueryReduction,
)
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.families import config_from_hf
from seer_jax.selection.rules import TopK
from tests.golden.data import RELEASE, gate_file, release, write_gates

PREFILL, DECODE = RELEASE
MODEL = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 8)
FORMATS = list(GateFormat)

PREFILL_CONFIGS = [
    PrefillGateConfig(gate_dim=8),
    PrefillGateConfig(gate_dim=8, force_double=True),
    PrefillGateConfig(gate_dim=12, block_size=128, k_pooling=(Pool.AVG,)),
    PrefillGateConfig(gate_dim=8, q_pooling=(Pool.MAX, Pool.AVG), k_pooling=(Pool.MIN,)),
]
DECODE_CONFIGS = [
    DecodeGateConfig(gate_dim=12),
    DecodeGateConfig(gate_dim=12, query_reduction=QueryReduction.AVG_PROJ, use_qk_norm=False, use_rope=False),
    DecodeGateConfig(gate_dim=8, query_reduction=QueryReduction.AVG, block_size=16, start_layer=2),
    DecodeGateConfig(gate_dim=8, k_pooling=(Pool.MAX, Pool.MIN)),
]
CONFIGS = [*PREFILL_CONFIGS, *DECODE_CONFIGS]
HEADS = DecodeGateConfig(gate_dim=8, query_reduction=QueryReduction.HEADS)
# What the release lacks: configurations, and what they must be to be written in its layout.
FINER = {
    "small key pools": (
        PrefillGateConfig(gate_dim=8, k_pool_size=16, join=Join.MAX),
        "k_pool_size must be the block size, 64, got 16",
    ),
    "small query pools": (
        PrefillGateConfig(gate_dim=12, q_pool_size=8),
        "q_pool_size must be the block size, 64, got 8",
    ),
    "both pools": (
        PrefillGateConfig(gate_dim=8, force_double=True, q_pool_size=4, k_pool_size=1, k_pooling=(Pool.AVG,)),
        "q_pool_size must be the block size, 64, got 4; k_pool_size must be the block size, 64, got 1",
    ),
    "queries of each head": (HEADS, "query_reduction must be Qproj, Qavgproj or Qavg, got Qheads"),
    "small pools while decoding": (
        dataclasses.replace(HEADS, heads=HeadJoin.MAX, k_pool_size=8, start_layer=1),
        "k_pool_size must be the block size, 64, got 8; query_reduction must be Qproj",
    ),
}
NAMES = [f"{kind}-{i}" for kind in ("prefill", "decode") for i in range(4)]


def make_gate(config: GateConfig, seed: int = 0) -> PrefillGate | DecodeGate:
    """A gate whose every number is random, signed zeros and subnormals among them."""
    random = np.random.default_rng(seed)

    def values(x: jax.ShapeDtypeStruct) -> jax.Array:
        out = random.normal(size=x.shape).astype(np.float32)
        out.flat[:2] = -0.0, 1e-40
        return jnp.asarray(out)

    return jax.tree.map(values, abstract_gate(config, MODEL))


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", RELEASE)
def test_the_gates_of_the_release_are_read_unchanged(name: str, tmp_path: Path):
    gate = load_gates(write_gates(tmp_path, name))
    names = {"mask_linear_k": "linear_k", "attngate_linear_q": "linear_q", "attngate_linear_k": "linear_k"}
    names |= {"attngate_qnorm": "q_norm", "attngate_knorm": "k_norm"}
    assert len(release(name).gate) == 2 * len(jax.tree.leaves(gate))
    for key, expected in release(name).gate.items():
        layer, name = int(key.split(".")[2]), key.split(".")[-2]
        np.testing.assert_array_equal(getattr(gate, names[name])[layer], expected)


@pytest.mark.parametrize("name", RELEASE)
@pytest.mark.parametrize("format", FORMATS)
def test_release_to_either_format_and_back_to_pth(name: str, format: GateFormat, tmp_path: Path):
    source = write_gates(tmp_path / "a", name)
    config, one = json.loads((source / "config.json").read_text()), load_gates(source)
    save_gates(one, tmp_path / "b", base_model="x", hf_config=config, format=format)
    two = load_gates(tmp_path / "b", one.model)
    assert_same(one, two)
    assert one.recommended == two.recommended == recommended_policy(source) is not None
    path = save_gates(two, tmp_path / "c", base_model="x", hf_config=config, format=GateFormat.TORCH)
    ours, theirs = read_torch_zip(path), read_torch_zip(gate_file(name))
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_every_kind_of_gate_comes_back_bit_for_bit(config: GateConfig, format: GateFormat, tmp_path: Path):
    gate = make_gate(config)
    path = save_gates(gate, tmp_path, base_model="some/base", format=format)
    assert path == tmp_path / f"attn_gate_weights.{format}"
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "config.json"]
    assert_same(load_gates(tmp_path, MODEL), gate)
    assert_same(load_gates(tmp_path), gate)


@pytest.mark.parametrize("name", FINER)
def test_gates_that_the_release_lacks_come_back_from_safetensors_alone(name: str, tmp_path: Path):
    """Their configuration has no key of the release, which readers of its layout would take for another gate."""
    (config, message), policy = FINER[name], TopK(0.25)
    gate = make_gate(config)
    save_gates(gate, tmp_path / "a", base_model="some/base", policy=policy)
    back = load_gates(tmp_path / "a", MODEL)
    assert back.config == config and back.recommended == policy
    back.recommended = None
    assert_same(back, gate)
    keys = json.loads((tmp_path / "a" / "config.json").read_text())
    assert {key for key in keys if key.startswith("seer")} == {"seer_jax_gate", "seer_jax_policy"}
    recommend(tmp_path / "a", tmp_path / "b", TopK(0.5))
    assert load_gates(tmp_path / "b").config == config
    # A gate of the release under the same folder has no trace of it.
    save_gates(make_gate(CONFIGS[0]), tmp_path / "a", base_model="x", hf_config=keys, force=True)
    assert load_gates(tmp_path / "a").config == CONFIGS[0]
    with pytest.raises(
        ValueError, match=rf"attn_gate_weights\.pth, must .* has: {message}.*\. Save it with format=saf"
    ):
        save_gates(gate, tmp_path / "c", base_model="x", format=GateFormat.TORCH)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_files_hold_the_rounded_gate(format: GateFormat, tmp_path: Path):
    gate = make_gate(PREFILL_CONFIGS[1])
    path = save_gates(gate, tmp_path, base_model="x", format=format, dtype=jnp.bfloat16)
    stored = read_torch_zip(path) if format is GateFormat.TORCH else load_file(path)
    assert {a.dtype for a in stored.values()} == {np.dtype(jnp.bfloat16)}
    got = load_gates(tmp_path, MODEL)
    for ours, rounded in zip(jax.tree.leaves(got), jax.tree.leaves(gate), strict=True):
        expected = np.asarray(rounded).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint32), expected.view(np.uint32))


def test_config_json_is_that_of_the_base_with_the_keys_of_the_gate(tmp_path: Path):
    base = release(PREFILL).config
    gate = load_gates(write_gates(tmp_path / "a", PREFILL))
    save_gates(gate, tmp_path / "b", base_model="some/base", hf_config=base, policy=TopK(0.25))
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {k: v for k, v in saved.items() if not k.startswith("seerattn_")} == {
        k: v for k, v in base.items() if not k.startswith("seerattn_")
    } | {"base_model": "some/base"}
    assert {k: v for k, v in saved.items() if k.startswith("seerattn_")} == {
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": 64,
        "seerattn_gate_force_double": False,
        "seerattn_sparsity_method": "nz_ratio",
        "seerattn_nz_ratio": 0.25,
        "seerattn_last_block_dense": True,
    }


def test_keys_of_the_other_kind_of_gate_do_not_stay(tmp_path: Path):
    gate = load_gates(write_gates(tmp_path / "a", DECODE))
    other = {"seerattn_gate_type": "Qavg_Kavg", "seerattn_threshold": 0.5, "seerattn_sparsity_method": "threshold"}
    gate.recommended = None
    other |= {"seer_jax_policy": {"rule": "mass", "mass": 0.5}}
    save_gates(gate, tmp_path / "b", base_model="x", hf_config=release(DECODE).config | other)
    assert_same(load_gates(tmp_path / "b"), gate)
    assert recommended_policy(tmp_path / "b") is None


def test_a_folder_is_written_over_but_not_by_another_kind_or_in_another_format(tmp_path: Path):
    first, second, other = (
        make_gate(DECODE_CONFIGS[0]),
        make_gate(DECODE_CONFIGS[0], seed=1),
        make_gate(PREFILL_CONFIGS[0]),
    )
    for gate in (first, second):
        save_gates(gate, tmp_path, base_model="x")
    with pytest.raises(FileExistsError, match=r"has a DecodeGate, which a PrefillGate would replace\. Choose another"):
        save_gates(other, tmp_path, base_model="x")
    with pytest.raises(
        FileExistsError, match=r"must hold one gate; .* already has attn_gate_weights\.safetensors\. Choose another"
    ):
        save_gates(second, tmp_path, base_model="x", format=GateFormat.TORCH)
    assert_same(load_gates(tmp_path), second)
    save_gates(other, tmp_path, base_model="x", force=True)
    assert_same(load_gates(tmp_path), other)


def test_a_gate_keeps_what_it_was_distilled_on(tmp_path: Path):
    gate = make_gate(DECODE_CONFIGS[0])
    save_gates(gate, tmp_path / "a", base_model="x", training={"step": 3, "target": "mass"})
    back = load_gates(tmp_path / "a")
    assert gate.distilled_on is None and back.distilled_on == "mass" == nnx.clone(back).distilled_on
    save_gates(back, tmp_path / "b", base_model="x")
    assert load_gates(tmp_path / "b").distilled_on == "mass"


def test_safetensors_are_read_where_both_formats_are(tmp_path: Path):
    gate = make_gate(PREFILL_CONFIGS[0])
    save_gates(gate, tmp_path, base_model="x")
    write_torch_zip(tmp_path / "attn_gate_weights.pth", {"other": np.ones(1, np.float32)})
    assert_same(load_gates(tmp_path), gate)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", RELEASE)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 3),
        ("num_heads", 16),
        ("num_kv_heads", 1),
        ("head_dim", 32),
        ("hidden_size", 128),
        ("family", "qwen2"),
        ("intermediate_size", 64),
        ("mlp_bias", True),
        ("rms_norm_eps", 1e-5),
    ],
)
def test_gates_of_another_model_are_refused(name: str, field: str, value: Any, tmp_path: Path):
    model = config_from_hf(release(name).config)
    found = getattr(model, field)
    message = rf"{field} must be {value}; got {found}, of a gate for 'authors/base'\. Use the gate of this base model"
    with pytest.raises(ValueError, match=message):
        load_gates(write_gates(tmp_path, name), dataclasses.replace(model, **{field: value}))


def test_a_longer_context_is_no_other_model(tmp_path: Path):
    model = config_from_hf(release(PREFILL).config)
    longer = dataclasses.replace(model, max_position_embeddings=2**17, vocab_size=1024)
    assert load_gates(write_gates(tmp_path, PREFILL), longer).model == longer


PLAIN = RopeConfig(theta=1e6)
YARN = RopeConfig(theta=1e6, kind=RopeKind.YARN, factor=4, original_max_position=512, attention_factor=1.25)
ROPES: dict[str, tuple[RopeConfig, RopeConfig, bool]] = {
    "YaRN": (YARN, YARN, True),
    "no YaRN in the gate": (PLAIN, YARN, False),
    "no YaRN in the model": (YARN, PLAIN, False),
    "another theta": (PLAIN, RopeConfig(theta=5e5), False),
    "another scale of cos and sin": (YARN, dataclasses.replace(YARN, attention_factor=1.0), False),
    "a context that plain RoPE does not read": (PLAIN, dataclasses.replace(PLAIN, original_max_position=512), True),
    "a scaling by 1": (PLAIN, RopeConfig(theta=1e6, kind=RopeKind.LINEAR, factor=1.0), True),
}


@pytest.mark.parametrize("name", ROPES)
def test_a_gate_serves_models_of_its_rope_alone(name: str, tmp_path: Path):
    theirs, ours, fits = ROPES[name]
    gate = make_gate(DECODE_CONFIGS[0])
    gate.model = dataclasses.replace(gate.model, rope=theirs)
    save_gates(gate, tmp_path, base_model="authors/base")
    hf = json.loads((tmp_path / "config.json").read_text())
    if hf["rope_scaling"]:  # as transformers 5 writes it
        hf["rope_parameters"] = hf.pop("rope_scaling") | dict(rope_theta=hf.pop("rope_theta"))
        (tmp_path / "config.json").write_text(json.dumps(hf))
    model = dataclasses.replace(gate.model, rope=ours)
    if fits:
        assert load_gates(tmp_path, model).model == model
        return
    with pytest.raises(
        ValueError, match=r"RoPE must be rope_theta=.*; got rope_theta=.*, of a gate for 'authors/base'. Use a gate"
    ):
        load_gates(tmp_path, model)


def test_saving_under_the_configuration_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="num_layers must be 3; got 2"):
        save_gates(make_gate(DECODE_CONFIGS[0]), tmp_path, base_model="x", hf_config=release(PREFILL).config)
    assert not (tmp_path / "config.json").exists()


def test_other_dtypes_are_not_saved(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 or float32; got .*float16"):
        save_gates(make_gate(DECODE_CONFIGS[0]), tmp_path, base_model="x", dtype=jnp.float16)


K1 = "model.layers.1.self_attn.attn_gate.{}_linear_k.weight"
WRONG_TENSORS = {
    "layer missing": (
        PREFILL,
        lambda w: w.pop(K1.format("mask")),
        r"missing: model\.layers\.1\..*mask_linear_k\.weight; left",
    ),
    "two-linear file for a one-linear gate": (
        PREFILL,
        lambda w: w.update({K1.format("mask").replace("_k", "_q"): np.ones((4, 64, 64), np.float32)}),
        r"missing: none; left over: .*mask_linear_q\.weight",
    ),
    "norm missing": (
        DECODE,
        lambda w: w.pop("model.layers.0.self_attn.attn_gate.attngate_qnorm.weight"),
        r"missing: .*0\.self_attn\.attn_gate\.attngate_qnorm\.weight; left over: none",
    ),
    "keys of the other kind": (
        PREFILL,
        lambda w: w.update({K1.format("attngate"): w.pop(K1.format("mask"))}),
        r"missing: .*mask_linear_k\.weight; left over: .*attngate_linear_k\.weight",
    ),
    "heads": (
        DECODE,
        lambda w: w.update({K1.format("attngate"): np.ones((8, 192, 64), np.float32)}),
        r"attngate_linear_k\.weight \(8, 192, 64\) instead of \(2, 192, 64\)",
    ),
    "nan": (
        DECODE,
        lambda w: w.update({K1.format("attngate"): np.full((2, 192, 64), np.nan, np.float32)}),
        r"weights must be finite in float32; '.*attngate_linear_k\.weight' holds NaN",
    ),
    "integers": (
        PREFILL,
        lambda w: w.update({K1.format("mask"): np.ones((4, 192, 64), np.int32)}),
        r"must be of dtype BF16, F16, F32; got .*mask_linear_k\.weight I32",
    ),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_refused(case: str, format: GateFormat, tmp_path: Path):
    name, change, message = WRONG_TENSORS[case]
    folder = write_gates(tmp_path, name)
    path = folder / "attn_gate_weights.pth"
    weights = dict(read_torch_zip(path))
    change(weights)
    path.unlink()
    save = write_torch_zip if format is GateFormat.TORCH else lambda p, w: save_file(w, p)
    save(folder / f"attn_gate_weights.{format}", weights)
    with pytest.raises(ValueError, match=message):
        load_gates(folder)


def test_a_wrong_torch_file_is_refused(tmp_path: Path):
    folder = write_gates(tmp_path, PREFILL)
    (folder / "attn_gate_weights.pth").write_bytes(b"\x80\x02cposix\nsystem\n.")
    with pytest.raises(ValueError, match=r"attn_gate_weights\.pth: .* must be the zip archive that torch\.save writes"):
        load_gates(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (write_gates(tmp_path, PREFILL) / "attn_gate_weights.pth").unlink()
    message = r"must hold attn_gate_weights\.safetensors or .*\.pth; .* has neither but config\.json\. Check that"
    with pytest.raises(FileNotFoundError, match=message):
        load_gates(tmp_path)


# ---------------------------------------------------------------------------------------------------- keys of config.json

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(Pool, n)]


@pytest.mark.parametrize("q", SUBSETS, ids="".join)
@pytest.mark.parametrize("k", SUBSETS, ids="".join)
def test_names_of_prefill_pooling(q: tuple[Pool, ...], k: tuple[Pool, ...]):
    config = PrefillGateConfig(q_pooling=q, k_pooling=k)
    name = gate_config_to_hf(config)["seerattn_gate_type"]
    assert name == f"Q{''.join(q)}_K{''.join(k)}"
    assert parse_prefill_pooling(name) == (q, k)


@pytest.mark.parametrize("k", SUBSETS, ids="".join)
def test_names_of_key_pooling(k: tuple[Pool, ...]):
    assert gate_config_to_hf(DecodeGateConfig(k_pooling=k))["seerattn_k_seq_pooling_type"] == f"K{''.join(k)}"
    assert parse_key_pooling(f"K{''.join(k)}") == k


@pytest.mark.parametrize(
    "name",
    ["", "Qavg", "Kavg", "Q_Kavg", "Qavg_K", "Qavg_Kavgmax", "Qavg_Kmaxmax", "Qavg_Kmedian", "qavg_kmax", "Qavg_Kmax "],
)
def test_other_names_of_prefill_pooling_are_refused(name: str):
    with pytest.raises(ValueError, match=f"as in 'Qavg_Kmaxminavg'; got '{name}'"):
        parse_prefill_pooling(name)


@pytest.mark.parametrize("name", ["", "K", "Kavgmin", "Qavg_Kavg", "Kmean", "maxminavg"])
def test_other_names_of_key_pooling_are_refused(name: str):
    with pytest.raises(ValueError, match=f"as in 'Kmaxminavg'; got '{name}'"):
        parse_key_pooling(name)


@pytest.mark.parametrize("config", [*CONFIGS, *(config for config, _ in FINER.values())], ids=[*NAMES, *FINER])
def test_gate_configurations_come_back(config: GateConfig):
    assert gate_config_from_hf(json.loads(json.dumps(gate_config_to_hf(config)))) == config


def test_absent_keys_mean_what_the_release_takes_for_them():
    assert gate_config_from_hf({"seerattn_gate_type": "Qavg_Kmaxminavg"}) == PrefillGateConfig()
    decode = {"seerattn_q_head_pooling_type": "Qproj", "seerattn_gate_hidden_size": None}
    assert gate_config_from_hf(decode) == DecodeGateConfig(use_qk_norm=False)


WRONG_GATES = {
    "neither": ({}, "must have either seerattn_gate_type .* got neither. Give the folder of one gate"),
    "both": (
        {"seerattn_gate_type": "Qavg_Kavg", "seerattn_q_head_pooling_type": "Qproj"},
        "must have either seerattn_gate_type .* got both",
    ),
    "all query heads": (
        {"seerattn_q_head_pooling_type": "Qorig"},
        "seerattn_q_head_pooling_type must be one of Qproj, Qavgproj, Qavg; got 'Qorig'",
    ),
    "block size": (
        {"seerattn_gate_type": "Qavg_Kavg", "seerattn_gate_block_size": 48},
        "block_size must be one of .* got 48",
    ),
    "gate dim": (
        {"seerattn_gate_type": "Qavg_Kavg", "seerattn_gate_hidden_size": 63},
        "gate_dim must be even .* got 63",
    ),
    "query heads in the release's layout": (
        {"seerattn_q_head_pooling_type": "Qheads"},
        "seerattn_q_head_pooling_type must be one of Qproj, Qavgproj, Qavg; got 'Qheads'",
    ),
    "described twice": (
        {"seerattn_gate_type": "Qavg_Kavg", "seer_jax_gate": {"kind": "prefill"}},
        "must describe it once; got seer_jax_gate beside keys of the release",
    ),
    "no kind": ({"seer_jax_gate": {"gate_dim": 8}}, "must hold kind, one of prefill, decode; got {'gate_dim': 8}"),
    "no settings": ({"seer_jax_gate": 5}, "must hold kind, one of prefill, decode; got 5"),
    "a setting of a later version": (
        {"seer_jax_gate": {"kind": "decode", "v_pool_size": 8}},
        "settings that this version knows. Settings of seer_jax_gate must be some of .*; got v_pool_size. A gate of a later",
    ),
    "a choice of a later version": (
        {"seer_jax_gate": {"kind": "prefill", "k_pool_size": 8, "join": "median"}},
        "seer_jax_gate.join must be one of sum, max; got 'median'",
    ),
    "pool size": (
        {"seer_jax_gate": {"kind": "prefill", "k_pool_size": 24}},
        "k_pool_size must be a power of two from 1 to the block size, 64 tokens; got 24",
    ),
}


@pytest.mark.parametrize("name", WRONG_GATES)
def test_wrong_gate_configurations_are_refused(name: str):
    keys, message = WRONG_GATES[name]
    with pytest.raises(ValueError, match=message):
        gate_config_from_hf(keys)


RELEASED = DecodeGateConfig(gate_dim=8)
# Configurations of config.json and of the weights, and what is said of them. All but the last have weights of the same shapes.
EXCHANGED = {
    "a release's for a finer": (
        RELEASED,
        HEADS,
        "query_reduction is 'Qproj' in config.json, 'Qheads' in the weights. Save",
    ),
    "a finer for a release's": (
        dataclasses.replace(RELEASED, k_pool_size=16),
        RELEASED,
        "k_pool_size is 16 in config.json, None in the weights. Save",
    ),
    "another finer": (
        dataclasses.replace(HEADS, k_pool_size=8, join=Join.MAX),
        dataclasses.replace(HEADS, k_pool_size=16),
        "k_pool_size is 8 in config.json, 16 in the weights; join is 'max' in config.json, 'sum' in the weights. Save",
    ),
    "another kind": (
        PREFILL_CONFIGS[0],
        HEADS,
        "gate; kind is 'prefill' in config.json, 'decode' in the weights. Save",
    ),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_a_configuration_of_another_gate_is_refused(name: str, tmp_path: Path):
    *configs, message = EXCHANGED[name]
    described, weights = tmp_path / "described", tmp_path / "weights"
    for folder, config in zip((described, weights), configs, strict=True):
        save_gates(make_gate(config), folder, base_model="base")
    os.replace(described / "config.json", weights / "config.json")
    with pytest.raises(ValueError, match=message):
        load_gates(weights)

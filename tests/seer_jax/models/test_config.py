"""Configurations: both styles of config.json mean the same, and what can't be computed exactly is refused. RoPE."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.gates.configs import (
    DecodeGateConfig,
    HeadJoin,
    Join,
    Pool,
    PrefillGateConfig,
    QueryReduction,
)
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.families import config_from_hf, config_to_hf
from seer_jax.models.rope import apply_rope, inverse_frequencies
from tests.golden.data import RELEASE, release, transformers_case, transformers_names

# Configurations as they are on the hub, cut to the keys that matter.
LLAMA_8B: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    hidden_act="silu",
    eos_token_id=[128001, 128008, 128009],
)
QWEN2_7B: dict[str, Any] = dict(
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    max_window_layers=28,
    sliding_window=131072,
    use_sliding_window=False,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=False,
    eos_token_id=151645,
)
QWEN3_4B: dict[str, Any] = dict(
    model_type="qwen3",
    attention_bias=False,
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    head_dim=128,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    rope_scaling=None,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
    eos_token_id=151645,
)
# As Mistral-7B-v0.3: without a window, and without a head_dim.
MISTRAL_7B: dict[str, Any] = dict(
    model_type="mistral",
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    hidden_act="silu",
    eos_token_id=2,
)

EXPECTED = {
    "llama": (
        LLAMA_8B,
        ModelConfig(
            *("llama", 128256, 4096, 14336, 32, 32, 8, 128),
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=5e5, kind=RopeKind.LLAMA3, factor=8, original_max_position=8192),
            max_position_embeddings=131072,
            eos_token_ids=(128001, 128008, 128009),
        ),
    ),
    "qwen2": (
        QWEN2_7B,
        ModelConfig(
            *("qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
            rope=RopeConfig(theta=1e6, original_max_position=32768),
            qkv_bias=True,
            max_position_embeddings=32768,
            eos_token_ids=(151645,),
        ),
    ),
    "qwen3": (
        QWEN3_4B,
        ModelConfig(
            *("qwen3", 151936, 2560, 9728, 36, 32, 8, 128),
            rope=RopeConfig(theta=1e6, original_max_position=40960),
            qk_norm=True,
            tie_word_embeddings=True,
            max_position_embeddings=40960,
            eos_token_ids=(151645,),
        ),
    ),
    "mistral": (
        MISTRAL_7B,
        ModelConfig(
            *("mistral", 32768, 4096, 14336, 32, 32, 8, 128),
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=1e6, original_max_position=32768),
            max_position_embeddings=32768,
            eos_token_ids=(2,),
        ),
    ),
}


def without(hf: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in hf.items() if k not in keys}


def new_style(hf: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    rope = dict(hf.get("rope_scaling") or dict(rope_type="default"), rope_theta=hf["rope_theta"])
    return without(hf, "rope_theta", "rope_scaling") | dict(rope_parameters=rope)


def oldest_style(hf: dict[str, Any]) -> dict[str, Any]:
    """Before `rope_type` there was `type`."""
    if not hf.get("rope_scaling"):
        return without(hf, "rope_scaling")
    return hf | dict(rope_scaling=dict(without(hf["rope_scaling"], "rope_type"), type=hf["rope_scaling"]["rope_type"]))


@pytest.mark.parametrize("style", [dict, new_style, oldest_style])
@pytest.mark.parametrize("family", EXPECTED)
def test_every_style_of_config_json_means_the_same(family: str, style: Callable):
    hf, expected = EXPECTED[family]
    assert config_from_hf(style(hf)) == expected


@pytest.mark.parametrize("family", EXPECTED)
def test_keys_of_gates_and_others_change_nothing(family: str):
    hf, expected = EXPECTED[family]
    assert config_from_hf(hf | dict(base_model="x", seerattn_gate_type="Qavg_Kavg", torch_dtype="bfloat16")) == expected


@pytest.mark.parametrize("family", EXPECTED)
def test_configurations_come_back_from_hf(family: str):
    expected = EXPECTED[family][1]
    assert config_from_hf(json.loads(json.dumps(config_to_hf(expected)))) == expected


ROPES = [
    RopeConfig(theta=1e4, kind=RopeKind.LINEAR, factor=2),
    RopeConfig(
        theta=5e5, kind=RopeKind.LLAMA3, factor=32, low_freq_factor=2, high_freq_factor=8, original_max_position=64
    ),
    RopeConfig(theta=1e6, kind=RopeKind.YARN, factor=4, original_max_position=128, attention_factor=1.25),
    RopeConfig(kind=RopeKind.YARN, factor=8, beta_fast=16, beta_slow=2, truncate=False, original_max_position=99),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r.kind)
def test_rope_scalings_come_back_from_hf(rope: RopeConfig):
    config = ModelConfig("llama", 8, 8, 8, 1, 2, 1, 4, rope=rope, max_position_embeddings=256)
    again = config_from_hf(config_to_hf(config)).rope
    if rope.kind is RopeKind.LINEAR:  # which has no original context
        again = dataclasses.replace(again, original_max_position=rope.original_max_position)
    assert again == rope


@pytest.mark.parametrize(
    ("family", "biases", "message"),
    [
        ("llama", dict(qkv_bias=True), "of a llama model can only mean qkv_bias=False here; got True"),
        ("qwen2", dict(), "of a qwen2 model can only mean qkv_bias=True here; got False"),
        ("qwen2", dict(qkv_bias=True, o_bias=True), "can only mean o_bias=False here; got True"),
        ("qwen3", dict(), "can only mean qk_norm=True here; got False"),
        ("qwen3", dict(qk_norm=True, mlp_bias=True), "can only mean mlp_bias=False here; got True. Use a family"),
        ("mistral", dict(qkv_bias=True), "of a mistral model can only mean qkv_bias=False here; got True"),
        ("mamba", dict(), "Unknown model_type 'mamba'"),
    ],
)
def test_what_config_json_cannot_say_is_refused(family: str, biases: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_to_hf(ModelConfig(family, 8, 8, 8, 1, 2, 1, 4, **biases))


@pytest.mark.parametrize("name", [*transformers_names(), *RELEASE])
def test_configurations_that_others_wrote(name: str):
    hf = (release(name) if name in RELEASE else transformers_case(name)).config
    config = config_from_hf(hf)
    assert config.family == hf["model_type"]
    assert (config.num_layers, config.num_heads) == (hf["num_hidden_layers"], hf["num_attention_heads"])
    assert config.head_dim == hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    assert config.group_size == hf["num_attention_heads"] // hf["num_key_value_heads"]
    assert config.tie_word_embeddings == hf["tie_word_embeddings"]
    assert config.qk_norm == (hf["model_type"] == "qwen3")
    assert config.qkv_bias == (hf["model_type"] == "qwen2" or hf.get("attention_bias", False))
    assert config.rope.theta == (hf.get("rope_parameters") or hf)["rope_theta"]


def test_absent_keys():
    bare = without(
        LLAMA_8B, "num_key_value_heads", "eos_token_id", "rope_theta", "rope_scaling", "hidden_act", "rms_norm_eps"
    )
    config = config_from_hf(without(bare, "tie_word_embeddings", "attention_bias", "mlp_bias"))
    assert (config.num_kv_heads, config.eos_token_ids, config.rms_norm_eps) == (32, (), 1e-6)
    assert config.rope == RopeConfig(theta=1e4, original_max_position=131072)
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias)


def test_biases_of_llama_and_qwen3():
    llama = config_from_hf(LLAMA_8B | dict(attention_bias=True, mlp_bias=True))
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias and not llama.qk_norm
    qwen3 = config_from_hf(QWEN3_4B | dict(attention_bias=True))
    assert qwen3.qkv_bias and qwen3.o_bias and not qwen3.mlp_bias


LLAMA3 = LLAMA_8B["rope_scaling"]
REFUSED = {
    "no family": (
        without(LLAMA_8B, "model_type"),
        r"Unknown model_type None; expected one of llama, qwen2, qwen3, mistral.*register_family",
    ),
    "family": (LLAMA_8B | dict(model_type="gemma3"), "Unknown model_type 'gemma3'"),
    "missing sizes": (
        without(LLAMA_8B, "vocab_size", "num_hidden_layers"),
        r"config\.json of a llama model needs vocab_size, num_hidden_layers; got keys \['attention_bias'",
    ),
    "activation": (LLAMA_8B | dict(hidden_act="gelu"), "activation must be 'silu'; got 'gelu'"),
    "sliding window": (
        QWEN2_7B | dict(use_sliding_window=True, max_window_layers=27),
        "must attend to all earlier tokens: .*; got use_sliding_window=True, .*layer_types=None. Use a checkpoint without",
    ),
    "sliding layers": (
        QWEN3_4B | dict(layer_types=["full_attention", "sliding_attention"]),
        r"must have use_sliding_window false and only full_attention layers; got .*'sliding_attention'\]",
    ),
    "Mistral's window": (
        MISTRAL_7B | dict(sliding_window=4096),
        r"must attend without a window: sliding_window of config\.json must be null; got 4096\. Use a checkpoint without a window",
    ),
    "Mistral's default window": (
        without(MISTRAL_7B, "sliding_window"),
        "got 4096, the default where the key is absent",
    ),
    "Mistral's layers": (MISTRAL_7B | dict(layer_types=["sliding_attention"]), "must attend to all earlier tokens"),
    "rope type": (
        LLAMA_8B | dict(rope_scaling=dict(rope_type="longrope", factor=4)),
        "RoPE type must be one of default, linear, llama3, yarn; got 'longrope'",
    ),
    "dynamic rope": (
        LLAMA_8B | dict(rope_scaling=dict(type="dynamic", factor=4)),
        "RoPE type must be one of .*; got 'dynamic'",
    ),
    "linear without factor": (
        LLAMA_8B | dict(rope_scaling=dict(type="linear")),
        r"RoPE of type 'linear' needs factor; got \['type'\]\. Complete config\.json",
    ),
    "yarn without factor": (LLAMA_8B | dict(rope_scaling=dict(rope_type="yarn", factor=None)), "'yarn' needs factor"),
    "llama3 without original": (
        LLAMA_8B | dict(rope_scaling=without(LLAMA3, "original_max_position_embeddings", "low_freq_factor")),
        "'llama3' needs original_max_position_embeddings, low_freq_factor; got",
    ),
    "partial rope": (LLAMA_8B | dict(partial_rotary_factor=0.5), "must rotate all channels of a head; got .* 0.5"),
    "partial rope, new style": (
        without(LLAMA_8B, "rope_scaling")
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)),
        "must rotate all channels of a head; got .* 0.25",
    ),
    "factor below 1": (
        LLAMA_8B | dict(rope_scaling=dict(type="linear", factor=0.5)),
        "factor must be at least 1; got 0.5",
    ),
    "llama3 factors": (
        LLAMA_8B | dict(rope_scaling=LLAMA3 | dict(low_freq_factor=4.0)),
        "needs low_freq_factor < high_freq_factor; got 4.0 and 4.0",
    ),
    "theta": (LLAMA_8B | dict(rope_theta=-1.0), "RopeConfig.theta must be positive; got -1.0"),
    "heads": (LLAMA_8B | dict(num_key_value_heads=5), "must divide the query heads .*num_heads=32, num_kv_heads=5"),
    "odd head": (LLAMA_8B | dict(head_dim=127), "head_dim must be even; got 127"),
    "no layers": (LLAMA_8B | dict(num_hidden_layers=0), "ModelConfig.num_layers must be positive; got 0"),
    "negative width": (LLAMA_8B | dict(hidden_size=-4, head_dim=2), "ModelConfig.hidden_size must be positive; got -4"),
    "eps": (LLAMA_8B | dict(rms_norm_eps=0.0), "ModelConfig.rms_norm_eps must be positive; got 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_computed_exactly_are_refused(name: str):
    hf, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)


REFUSED_GATES = {
    "block size": (lambda: PrefillGateConfig(block_size=8), "block_size must be one of 16, 32, 64, 128 tokens; got 8"),
    "odd block size": (lambda: DecodeGateConfig(block_size=48), "block_size must be one of .* got 48"),
    "gate dim": (lambda: PrefillGateConfig(gate_dim=0), "gate_dim must be even and positive, .* got 0"),
    "odd gate dim": (lambda: DecodeGateConfig(gate_dim=65), "gate_dim must be even and positive, .* got 65"),
    "no query pool": (lambda: PrefillGateConfig(q_pooling=()), r"GateConfig.q_pooling must be some of .* got none"),
    "order": (
        lambda: PrefillGateConfig(k_pooling=(Pool.AVG, Pool.MAX)),
        "GateConfig.k_pooling must be .* and in that order; got avg, max",
    ),
    "twice": (
        lambda: DecodeGateConfig(k_pooling=(Pool.MAX, Pool.MAX)),
        "GateConfig.k_pooling must be some of .* each once",
    ),
    "start layer": (
        lambda: DecodeGateConfig(start_layer=-1),
        "start_layer, the number of dense first layers, must be at least 0; got -1",
    ),
    "pool of no token": (
        lambda: PrefillGateConfig(q_pool_size=0),
        "PrefillGateConfig.q_pool_size must be a power of two from 1 to the block size, 64 tokens; got 0",
    ),
    "odd pool": (lambda: DecodeGateConfig(k_pool_size=24), "k_pool_size must be a power of two .*; got 24"),
    "pool above a block": (
        lambda: PrefillGateConfig(block_size=32, k_pool_size=64),
        "k_pool_size must be .* to the block size, 32 tokens; got 64",
    ),
    "single tokens pooled three times": (
        lambda: DecodeGateConfig(k_pool_size=1),
        "k_pool_size=1 .* so DecodeGateConfig.k_pooling must name one kind; got max, min, avg. Set DecodeGateConfig.k_pooling=avg",
    ),
    "join of one key": (
        lambda: PrefillGateConfig(q_pool_size=16, join=Join.MAX),
        "join=max .* so PrefillGateConfig.k_pool_size must be below the block size, 64; got 64. Set PrefillGateConfig.k_pool_size, or",
    ),
    "join of a reduced group": (
        lambda: DecodeGateConfig(heads=HeadJoin.MAX),
        "heads=max .* query_reduction must be Qheads; got Qproj. Set query_reduction=Qheads, or",
    ),
}


@pytest.mark.parametrize("name", REFUSED_GATES)
def test_gates_that_make_no_sense_are_refused(name: str):
    make, message = REFUSED_GATES[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "one"),
    [
        (PrefillGateConfig(gate_dim=64), True),
        (PrefillGateConfig(gate_dim=128), False),
        (PrefillGateConfig(gate_dim=64, force_double=True), False),
        (PrefillGateConfig(gate_dim=64, q_pooling=(Pool.MAX, Pool.AVG)), False),
        (PrefillGateConfig(gate_dim=64, q_pooling=(Pool.MIN,), k_pooling=(Pool.AVG,)), True),
    ],
)
def test_which_gates_have_one_projection(config: PrefillGateConfig, one: bool):
    assert config.one_linear(head_dim=64) is one


def test_pools_of_blocks_are_those_of_the_release():
    """However they are written."""
    assert PrefillGateConfig(q_pool_size=64, k_pool_size=64) == PrefillGateConfig()
    assert DecodeGateConfig(block_size=32, k_pool_size=32) == DecodeGateConfig(block_size=32)


WRONG_TYPES = [
    (RopeConfig(), dict(kind="yarnn"), r"RopeConfig\.kind must be one of default, .*; got 'yarnn'"),
    (RopeConfig(), dict(theta="x"), r"RopeConfig\.theta must be a number; got 'x'"),
    (EXPECTED["llama"][1], dict(num_layers="8"), r"ModelConfig\.num_layers must be of type int; got '8'"),
    (EXPECTED["llama"][1], dict(eos_token_ids=5), r"eos_token_ids must be a list of int; got 5"),
    (EXPECTED["llama"][1], dict(rope=1), r"rope must be of type RopeConfig; got 1"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("config", "changes", "message"), WRONG_TYPES)
def test_settings_of_another_type_are_refused(config: Any, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_configurations_are_values():
    assert hash(EXPECTED["llama"][1]) == hash(config_from_hf(LLAMA_8B))
    assert DecodeGateConfig(query_reduction=QueryReduction("Qavg")) != DecodeGateConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPECTED["llama"][1].num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


# ------------------------------------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("name", transformers_names("rope."))
def test_frequencies_are_those_of_transformers(name: str):
    golden = transformers_case(name)
    rope = RopeConfig.from_hf(golden.config)
    ours = inverse_frequencies(rope, 128)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, golden.io["inverse_frequencies"], rtol=5e-7)
    assert rope.attention_factor == pytest.approx(float(golden.io["scale"]), rel=1e-6)


# Llama-3.1-8B, Qwen2.5 with YaRN, linear: first two frequencies, the last one, scale of cos and sin.
PUBLISHED = [
    (RopeConfig.from_hf(LLAMA_8B), (1.0, 0.814617, 3.06893e-07), 1.0),
    (
        RopeConfig.from_hf(
            dict(rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768))
        ),
        (1.0, 0.805842, 3.10234e-07),
        1.138629,
    ),
    (RopeConfig(theta=1e4, kind=RopeKind.LINEAR, factor=2), (0.5, 0.432982, 5.77391e-05), 1.0),
    (RopeConfig(theta=1e4), (1.0, 0.865964, 1.15478e-04), 1.0),
]


@pytest.mark.parametrize(
    ("rope", "frequencies", "scale"), PUBLISHED, ids=lambda x: x.kind if isinstance(x, RopeConfig) else ""
)
def test_frequencies_at_real_sizes(rope: RopeConfig, frequencies: tuple[float, ...], scale: float):
    np.testing.assert_allclose(inverse_frequencies(rope, 128)[[0, 1, -1]], frequencies, rtol=2e-6)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (dict(attention_factor=0.7), 0.7),
        (dict(mscale=1.0, mscale_all_dim=0.5), (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)),
        (dict(mscale=2.0), 0.1 * np.log(4) + 1),
        (dict(factor=1.0), 1.0),
    ],
)
def test_attention_factor_of_yarn(keys: dict[str, float], expected: float):
    rope = RopeConfig.from_hf(dict(rope_parameters=dict(rope_type="yarn", factor=4.0) | keys))
    assert rope.attention_factor == pytest.approx(expected)


@pytest.mark.parametrize("rope", [RopeConfig(theta=100.0), ROPES[1], ROPES[2]], ids=lambda r: r.kind)
def test_rotation_is_that_of_complex_numbers(rope: RopeConfig):
    """Channels i and i + dim / 2 are real and imaginary part; the angle is position times frequency."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = random.integers(0, 500, (2, 5))
    angle = positions[..., None, None] * inverse_frequencies(rope, 8).astype(np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle) * rope.attention_factor
    expected = np.concatenate([turned.real, turned.imag], -1)
    ours = apply_rope(jnp.asarray(x), jnp.asarray(positions, jnp.int32), rope)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_positions_are_shared_by_the_batch_and_rotation_keeps_the_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2, 6)), jnp.bfloat16)
    shared, own = (apply_rope(x, p, RopeConfig()) for p in (jnp.arange(4)[None], jnp.tile(jnp.arange(4), (3, 1))))
    assert shared.dtype == jnp.bfloat16
    np.testing.assert_array_equal(shared, own)
    np.testing.assert_array_equal(shared[:, 0], x[:, 0])


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(q_position: int, k_position: int) -> float:
        a, b = (
            apply_rope(jnp.asarray(x), jnp.array([[p]]), RopeConfig()) for x, p in ((q, q_position), (k, k_position))
        )
        return float((a * b).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


@pytest.mark.parametrize(("family", "head_dim"), [("llama", 96), ("qwen2", 96), ("qwen3", 128), ("mistral", 96)])
def test_head_dim_that_config_json_leaves_out(family: str, head_dim: int):
    """Qwen3's default in transformers is 128, whatever the hidden size; the others divide it among the heads."""
    hf = {key: value for key, value in LLAMA_8B.items() if key != "head_dim"}
    hf |= dict(model_type=family, hidden_size=96 * hf["num_attention_heads"], sliding_window=None)
    assert config_from_hf(hf).head_dim == head_dim


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 131072),  # llama3: the stretched length is the one in max_position_embeddings
        (dict(rope_scaling=None, max_position_embeddings=40960), 40960),
        (dict(rope_scaling=YARN, max_position_embeddings=40960), 131072),  # as on the card of Qwen3
        (dict(rope_scaling=YARN, max_position_embeddings=32768), 131072),  # as on the card of Qwen2.5
        (dict(rope_scaling=YARN, max_position_embeddings=131072), 131072),
        (dict(rope_scaling=dict(type="linear", factor=4.0), max_position_embeddings=4096), 16384),
    ],
)
def test_context_is_what_rope_stretches_it_to(changes: dict[str, Any], context: int):
    assert config_from_hf(LLAMA_8B | changes).context == context

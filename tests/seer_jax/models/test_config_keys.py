"""Every key of config.json is read, refused by name, or known to change nothing; transformers' own classes say which keys there are."""

import copy
import dataclasses
import re
from typing import Any

import pytest
import transformers

from seer_jax.models.config import RopeConfig
from seer_jax.models.families import config_from_hf

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
OURS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": dict(sliding_window=None),
    "qwen2": dict(max_window_layers=2),
    "qwen3": dict(max_window_layers=2),
}
NEIGHBOURS = [
    *("GraniteConfig", "OlmoConfig", "Olmo2Config", "SmolLM3Config", "Phi3Config", "Gemma2Config", "Gemma3TextConfig"),
    *("Qwen2MoeConfig", "Qwen3MoeConfig", "MixtralConfig", "GraniteMoeConfig", "Llama4TextConfig", "DeepseekV3Config"),
    *("CohereConfig", "Starcoder2Config", "StableLmConfig", "NemotronConfig", "GPTNeoXConfig", "MinistralConfig"),
]
BASE: dict[str, dict[str, Any]] = {
    family: dict(SIZES, model_type=family, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=256)
    | WINDOWS.get(family, {})
    for family in OURS
}

# Another value of a key, where no simple rule gives one.
OTHER: dict[str, Any] = dict(
    hidden_act="gelu",
    hidden_activation="gelu",
    layer_types=["sliding_attention"] * 4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    no_rope_layers=[1, 0, 1, 0],
    rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e6),
    rope_local_base_freq=1e4,
    architectures=["OtherForCausalLM"],
    eos_token_id=9,
    q_lora_rank=8,
    mlp_layer_types=["sparse"] * 4,
    moe_layers=[1],
    per_layer_config={"1": dict(hidden_act="gelu")},
)
# Keys that change no logits, with the reason.
ONLY_EXPERTS = "counts only beside a number of experts, which is refused"
ONLY_NAMES = "names, versions, labels"
HARMLESS = {
    **dict.fromkeys(("initializer_range", "initializer_factor"), "of weights that are made, not loaded"),
    **dict.fromkeys(
        ("use_cache", "output_hidden_states", "return_dict", "cache_implementation"), "what is kept or returned"
    ),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "sep_token_id"), "of text, not of logits"),
    **dict.fromkeys(("transformers_version", "dtype", "id2label", "label2id", "problem_type"), ONLY_NAMES),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"), "in training"),
    **dict.fromkeys(("residual_dropout", "embedding_dropout", "classifier_dropout"), "in training"),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise"), "in training"),
    **dict.fromkeys(("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"), ONLY_EXPERTS),
    **dict.fromkeys(
        ("output_router_logits", "n_group", "topk_group", "topk_method", "first_k_dense_replace"), ONLY_EXPERTS
    ),
    **dict.fromkeys(("scoring_func", "intermediate_size_mlp"), ONLY_EXPERTS),
    "is_decoder": "what all of them are",
    "num_mtp_layers": "adds tensors, which are refused",
    "pretraining_tp": "splits products and adds them up",
    "chunk_size_feed_forward": "splits tokens, each of which is computed by itself",
    "max_window_layers": "counts only beside a window, which is refused",
    "original_max_position_embeddings": "counts only beside a RoPE scaling",
}
HARMLESS_IN = {
    ("mistral", "use_sliding_window"),
    ("qwen2", "sliding_window"),
    ("qwen3", "sliding_window"),
    ("qwen2", "attention_bias"),
    ("qwen2", "qkv_bias"),
}


def keys_of(config_class: Any) -> dict[str, Any]:
    """Keys of a configuration class, with their default values."""
    default = dataclasses.MISSING
    return {
        f.name: None if f.default is default else f.default
        for f in dataclasses.fields(config_class)
        if not f.name.startswith("_")
    }


def other_values(key: str, default: Any) -> list[Any]:
    """Values of a key, one of which differs from what every model here computes."""
    if key in OTHER:
        return [OTHER[key]]
    match default:
        case bool():
            return [True, False]
        case int() | float():
            return [2 * default + 1]
        case str():
            return ["other"]
    return [7]


def outcome(family: str, key: str, value: Any) -> str:
    """ "read", "refused" or "ignored"; another error as it is."""
    try:
        config = config_from_hf(BASE[family] | {key: value})
    except ValueError as error:
        return "refused" if re.search(rf"\b{key}\b", str(error)) else str(error)
    return "ignored" if config == config_from_hf(BASE[family]) else "read"


@pytest.mark.parametrize("name", [*(c.__name__ for c in OURS.values()), *NEIGHBOURS])
def test_each_key_is_read_or_refused_by_name_or_harmless(name: str):
    wrong = {}
    for family in OURS:
        for key, default in keys_of(getattr(transformers, name)).items():
            harmless = key in HARMLESS or (family, key) in HARMLESS_IN
            got = {outcome(family, key, value) for value in other_values(key, default)} - {"ignored"}
            if got if harmless else not got or got - {"read", "refused"}:
                wrong[family, key] = got
    assert not wrong, wrong


@pytest.mark.parametrize("family", OURS)
def test_absent_keys_have_the_defaults_of_transformers(family: str):
    """Also of those whose defaults differ between the families."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | WINDOWS.get(family, {})
    sizes |= dict(num_attention_heads=32, hidden_size=256)
    theirs, ours = OURS[family](**sizes), config_from_hf(dict(sizes, model_type=family))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 8)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.o_bias == getattr(theirs, "attention_bias", False)


@pytest.mark.parametrize("family", OURS)
def test_null_is_absent(family: str):
    for key in {*keys_of(OURS[family])} - {"sliding_window", "num_key_value_heads"}:
        if key not in SIZES:
            absent = {k: v for k, v in BASE[family].items() if k != key}
            assert config_from_hf(absent | {key: None}) == config_from_hf(absent), key


NEAR_MISSES = [
    ("GraniteConfig", r"attention_multiplier of config\.json must be absent or 0\.35"),
    (
        "SmolLM3Config",
        r"no_rope_layers of config\.json must be absent or \[1, 1, 1, 1\] in a llama model; got \[1, 1, 1, 0\]",
    ),
    ("Gemma2Config", "sliding_window=4096"),
    ("Qwen2MoeConfig", "moe_intermediate_size of config.json must be absent or 0 in a llama model; got 1408"),
    ("CohereConfig", "logit_scale of config.json must be absent or 1 in a llama model; got 0.0625"),
]


@pytest.mark.parametrize(("name", "message"), NEAR_MISSES)
def test_a_neighbour_under_the_name_of_a_family_is_refused(name: str, message: str):
    hf = getattr(transformers, name)(**SIZES).to_dict() | dict(model_type="llama")
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_is_known_by_its_architecture(name: str):
    architecture = f"{name.removesuffix('Config').removesuffix('Text')}ForCausalLM"
    with pytest.raises(ValueError, match=rf"architectures of config.json must name LlamaForCausalLM .*{architecture}"):
        config_from_hf(BASE["llama"] | dict(architectures=[architecture]))


# Oddities of published configurations that change nothing.
LLAMA, QWEN2, QWEN3, MISTRAL = (BASE[family] for family in OURS)
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2": LLAMA
    | {
        "rope_interleaved": False,
        "is_llama_config": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "TinyLlama": LLAMA | dict(architectures=["LlamaForCausalLM"], pretraining_tp=1, torch_dtype="float32"),
    "the first LLaMA": LLAMA | dict(architectures=["LLaMAForCausalLM"], max_sequence_length=2048),
    "unsloth": LLAMA | dict(unsloth_fixed=True, unsloth_version="2024.9"),
    "phi-4 as Llama": LLAMA | dict(embd_pdrop=0.0, resid_pdrop=0.0, original_max_position_embeddings=16384),
    "R1 distill": QWEN2 | dict(sliding_window=4096, use_sliding_window=False, max_window_layers=3, use_mrope=False),
    "all layers before the window": QWEN2 | dict(sliding_window=128, use_sliding_window=True, max_window_layers=4),
    "a switch without a window": QWEN3 | dict(sliding_window=None, use_sliding_window=True, max_window_layers=0),
    "a Llama with the switch off": LLAMA | dict(sliding_window=4096, use_sliding_window=False),
    "Qwen2 that names its biases": QWEN2 | dict(attention_bias=True),
    "swish": LLAMA | dict(hidden_act="swish"),
    "PaddleNLP": LLAMA | dict(alibi=False, rope_scaling_factor=1.0, rope_scaling_type=None, use_fused_rope=True),
    "custom code": LLAMA | dict(auto_map={"AutoModelForCausalLM": "modeling.Model"}),
    "a gate of the release": QWEN3
    | dict(architectures=["SeerAttnQwen3ForCausalLM"], use_flash_rope=True, fused_norm=True, pruned_heads={}),
    "granite without scales": LLAMA | dict(embedding_multiplier=1.0, attention_multiplier=8**-0.5, logits_scaling=1),
    "v0.3": MISTRAL | dict(sliding_window=None, architectures=["MistralForCausalLM"], attention_dropout=0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_oddities_of_published_configurations_change_nothing(name: str):
    hf = PUBLISHED[name]
    assert config_from_hf(hf) == config_from_hf(BASE[hf["model_type"]])


def test_a_model_of_chunked_attention_ends_where_it_is_another_computation():
    chunks = dict(chunk_size=64, local_size=16, original_max_position_embeddings=128)
    assert config_from_hf(QWEN2 | dict(dual_chunk_attention_config=chunks)).max_position_embeddings == 128


# ------------------------------------------------------------------------------------------------------------------- RoPE

YARN: dict[str, Any] = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3: dict[str, Any] = dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
)
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta beside": dict(rope_theta=1e6),
    "theta inside": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "theta in both places": dict(rope_theta=5e5, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "theta in rope_scaling": dict(rope_theta=5e5, rope_scaling=YARN | dict(rope_theta=1e6)),
    "rope_scaling before rope_parameters": dict(
        rope_theta=1e6, rope_parameters=dict(rope_type="default", rope_theta=1e6), rope_scaling=YARN
    ),
    "empty rope_scaling": dict(rope_scaling={}, rope_parameters=dict(YARN, rope_theta=1e6)),
    "no rope_scaling": dict(rope_scaling=None, rope_parameters=dict(LLAMA3, rope_theta=1e6)),
    "type": dict(rope_scaling=dict(type="linear", factor=2.0)),
    "type and rope_type": dict(rope_scaling=dict(YARN, type="linear")),
    "original context beside": dict(rope_scaling=YARN, original_max_position_embeddings=32),
    "original context of llama3 beside": dict(rope_scaling=LLAMA3, original_max_position_embeddings=32),
    "no original context": dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "all of yarn": dict(rope_scaling=YARN | dict(beta_fast=16, beta_slow=2, truncate=False, attention_factor=1.5)),
    "partial 1": dict(partial_rotary_factor=1.0, rope_scaling=YARN),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", OURS)
def test_rope_is_read_as_by_transformers(family: str, name: str):
    hf = BASE[family] | ROPES[name]
    theirs = OURS[family](**copy.deepcopy({key: value for key, value in hf.items() if key != "model_type"}))
    theirs.standardize_rope_params()  # once more, as before frequencies are computed
    expected, ours = theirs.rope_parameters, config_from_hf(hf).rope
    assert (ours.kind, ours.theta) == (expected["rope_type"], expected["rope_theta"])
    assert ours.factor == expected.get("factor", 1.0)
    if ours.kind in ("yarn", "llama3"):
        assert ours.original_max_position == expected["original_max_position_embeddings"]
    for key in ("beta_fast", "beta_slow", "truncate", "attention_factor", "low_freq_factor", "high_freq_factor"):
        assert key not in expected or getattr(ours, key) == expected[key]


WRONG_ROPES: dict[str, tuple[dict[str, Any], str]] = {
    # As in DeepSeek-R1-0528-Qwen3-8B, whose product of the two is 1.
    "attn_factor": (
        dict(rope_scaling=YARN | dict(attn_factor=0.8782488562869419)),
        "attn_factor of config.json must be absent, .*; got 0.878.* Write attention_factor 1 in its place .* or remove it",
    ),
    "attn_factor of linear": (
        dict(rope_scaling=dict(type="linear", factor=2.0, attn_factor=2.0)),
        "got attn_factor=2.0",
    ),
    "mscale of linear": (
        dict(rope_scaling=dict(type="linear", factor=2.0, mscale=1.0)),
        "of type 'linear' .*got mscale=1.0",
    ),
    "factor of default": (dict(rope_scaling=dict(type="default", factor=2.0)), "of type 'default' .*got factor=2.0"),
    "longrope's factors": (dict(rope_parameters=YARN | dict(short_factor=[1.0])), r"got short_factor=\[1.0\]"),
    "mrope": (dict(rope_scaling=dict(type="default", mrope_section=[2, 1, 1])), r"got mrope_section=\[2, 1, 1\]"),
    "by layer type": (
        dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
        "got full_attention={'rope_type'",
    ),
    "proportional": (dict(rope_scaling=dict(rope_type="proportional")), "must be one of .*; got 'proportional'"),
    "partial beside": (dict(partial_rotary_factor=0.5, rope_scaling=YARN), "partial_rotary_factor 0.5"),
    "a theta that transformers would lose": (
        dict(rope_scaling=YARN, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "rope_theta must stand where it is read: .* its rope_theta 1000000.0. Put rope_theta into rope_scaling",
    ),
    "a share that transformers would lose": (
        dict(rope_theta=1e4, rope_scaling=YARN, rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
        "partial_rotary_factor must stand where it is read: .* 0.5. Put",
    ),
    "theta as text": (dict(rope_theta="1e6"), "rope_theta of config.json must be a finite number; got '1e6'"),
    "no object": (dict(rope_scaling="yarn"), "rope_scaling of config.json must be an object or null; got 'yarn'"),
    "factor as text": (
        dict(rope_scaling=YARN | dict(factor="4")),
        "factor of config.json must be a finite number; got '4'",
    ),
    "truncate as text": (
        dict(rope_scaling=YARN | dict(truncate="no")),
        "truncate of config.json must be true or false",
    ),
    "no turns": (dict(rope_scaling=YARN | dict(beta_slow=0)), "RopeConfig.beta_slow must be positive; got 0"),
}


@pytest.mark.parametrize("name", WRONG_ROPES)
def test_other_ropes_are_refused_by_name(name: str):
    keys, message = WRONG_ROPES[name]
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | keys)


def test_keys_of_rope_that_are_neutral_change_nothing():
    neutral = dict(attn_factor=1.0, extrapolation_factor=1, finetuned=True, short_factor=None)
    assert RopeConfig.from_hf(dict(rope_scaling=YARN | neutral)) == RopeConfig.from_hf(dict(rope_scaling=YARN))


# ------------------------------------------------------------------------------------------------------------------ values

WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    (dict(tie_word_embeddings="false"), "tie_word_embeddings of config.json must be true or false; got 'false'"),
    (dict(attention_bias=1), "attention_bias of config.json must be true or false; got 1"),
    (dict(use_sliding_window="false"), "use_sliding_window of config.json must be true or false; got 'false'"),
    (dict(hidden_size="32"), "hidden_size of config.json must be an integer below 2.*; got '32'"),
    (dict(num_hidden_layers=4.5), "num_hidden_layers of config.json must be an integer below 2.*; got 4.5"),
    (dict(num_hidden_layers=True), "num_hidden_layers of config.json must be an integer below 2.*; got True"),
    (dict(num_hidden_layers=10**9), "ModelConfig.num_layers must be at most 10000; got 1000000000"),
    (dict(vocab_size=10**400), "vocab_size of config.json must be an integer below 2.*; got a longer number"),
    (dict(vocab_size=[64]), r"vocab_size of config.json must be an integer below 2.*; got \[64\]"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps of config.json must be a finite number; got nan"),
    (
        dict(eos_token_id="</s>"),
        "eos_token_id of config.json must be a token id, a list of token ids or null; got '</s>'",
    ),
    (dict(eos_token_id=[1, 2.5]), r"eos_token_id of config.json must be .*; got \[1, 2.5\]"),
    (
        dict(hidden_size=34, head_dim=None),
        "must be a multiple of num_attention_heads where head_dim is absent; got 34 and 4",
    ),
    (dict(quantization_config=dict(quant_method="gptq")), r"must not be quantised; .*quantization_config \(gptq\)"),
    (dict(quantization=dict(group_size=64, bits=4)), r"must not be quantised; config.json has a quantization "),
    (dict(compression_config={"format": "int"}), r"must not be quantised; .*compression_config"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG_VALUES, ids=[next(iter(keys)) for keys, _ in WRONG_VALUES])
def test_values_of_another_type_are_refused(keys: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | keys)


STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    10**9,
    10**400,
    1.5,
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    [None],
    [[]],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("family", OURS)
def test_strange_values_give_one_line(family: str):
    """Whatever a damaged config.json says, it is read or refused."""
    keys = {
        *keys_of(OURS[family]),
        *("rope_scaling", "rope_theta", "dual_chunk_attention_config", "no_rope_layers", "model_type"),
    }
    changes: list[dict[str, Any]] = [{key: value} for key in keys for value in STRANGE]
    for rope in (YARN, LLAMA3):
        changes += [
            dict(rope_scaling=rope | {key: value}) for key in (*rope, "beta_slow", "mscale") for value in STRANGE
        ]
    for change in changes:
        try:
            config_from_hf(BASE[family] | change)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1

"""Metadata of GGUF files: each key that changes what is computed is honoured, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax import load_generation_settings
from seer_jax.inference.sampling import Sample
from seer_jax.models.config import RopeConfig, RopeKind
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import read_config
from tests.convert.gguf.files import write_gguf
from tests.golden.data import transformers_case

LLAMA, QWEN3 = "mistral", "qwen3_tied"  # plain RoPE


def written(path: Path, name: Any = LLAMA, tensors: Any = None, **metadata: Any) -> Path:
    """A golden model with changed metadata: "x__y" is the key "x.y", and a leading "_" the architecture."""
    golden = transformers_case(name)
    arch = "llama" if golden.config["model_type"] == "mistral" else golden.config["model_type"]
    keys = {
        (arch + key if key.startswith("_") else key).replace("__", ".").replace(f"{arch}_", f"{arch}."): v
        for key, v in metadata.items()
    }
    return write_gguf(path / "model.gguf", golden.config, golden.base, metadata=keys, tensors=tensors)


HONOURED = [
    ({}, dict(head_dim=10, num_kv_heads=2, max_position_embeddings=256, tie_word_embeddings=False)),
    (dict(_rope__freq_base=None), dict(rope=RopeConfig(1e4, original_max_position=256))),
    (dict(_rope__scaling__factor=4.0), dict(rope=RopeConfig(1e6, RopeKind.LINEAR, 4.0, 256))),
    (dict(_rope__scale_linear=2.0), dict(rope=RopeConfig(1e6, RopeKind.LINEAR, 2.0, 256))),
    (
        dict(_rope__scaling__type="none", _rope__scaling__factor=4.0),
        dict(rope=RopeConfig(1e6, original_max_position=256)),
    ),
    (
        dict(_rope__scaling__type="linear", _rope__scaling__factor=0.0),
        dict(rope=RopeConfig(1e6, original_max_position=256)),
    ),
    (dict(_attention__head_count_kv=[2, 2]), dict(num_kv_heads=2)),
    (dict(_attention__head_count_kv=None, _attention__head_count=4), dict(num_kv_heads=4)),
    (dict(_vocab_size=None, _expert_count=0, _attention__sliding_window=256), dict(vocab_size=48)),
    (dict(_attention__layer_norm_rms_epsilon=1e-6), dict(rms_norm_eps=1e-6)),
    (dict(_attention__layer_norm_rms_epsilon=1e-5, _tensor_data_layout="x"), dict(rms_norm_eps=1e-5)),
    (
        {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 3},
        dict(eos_token_ids=(3, 5)),
    ),
]


@pytest.mark.parametrize(("metadata", "fields"), HONOURED, ids=lambda value: ",".join(value) or "-")
def test_what_is_honoured(metadata: dict[str, Any], fields: dict[str, Any], tmp_path: Path):
    config = config_from_hf(read_config(written(tmp_path, **metadata)))
    assert {name: getattr(config, name) for name in fields} == fields


def test_yarn_has_its_own_keys(tmp_path: Path):
    keys = dict(
        _rope__scaling__original_context_length=64,
        _rope__scaling__yarn_beta_fast=16.0,
        _rope__scaling__yarn_beta_slow=2.0,
    )
    rope = config_from_hf(
        read_config(written(tmp_path, _rope__scaling__type="yarn", _rope__scaling__factor=4.0, **keys))
    ).rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.beta_fast, rope.beta_slow) == (
        RopeKind.YARN,
        4,
        64,
        16,
        2,
    )
    assert rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


def test_factors_of_one_change_nothing(tmp_path: Path):
    config = config_from_hf(read_config(written(tmp_path, tensors={"rope_freqs.weight": np.ones(5)})))
    assert config.rope == RopeConfig(1e6, original_max_position=256)


FIVE = dict(tensors={"rope_freqs.weight": np.array([1, 1, 2, 3, 8.0])})
REFUSED = [
    (
        {"general.architecture": "gemma3"},
        r"general\.architecture must be one of llama, qwen2, qwen3; got 'gemma3'\. Models of other",
    ),
    ({"general.type": "mmproj"}, r"must hold a model; its general\.type is 'mmproj'\. Give the file of the model"),
    (
        dict(_expert_count=8),
        r"llama\.expert_count must be absent or 0; got 8, which may change what is computed\. Use a model without it",
    ),
    (dict(_attention__scale=0.5), r"llama\.attention\.scale must be absent or 0; got 0\.5"),
    (dict(_attention__causal=False), r"llama\.attention\.causal must be absent or True; got False"),
    (dict(_logit_scale=2.0), r"llama\.logit_scale must be absent or 0 or 1; got 2\.0"),
    (dict(_new_idea=1), r"llama\.new_idea must be absent; got 1"),
    (
        dict(_attention__sliding_window=64),
        r"llama\.attention\.sliding_window must be absent, 0 or at least the context of 256 tokens; got 64",
    ),
    (
        dict(_attention__head_count_kv=[2, 4]),
        r"llama\.attention\.head_count_kv must be the same in all layers; got \[2, 4\]",
    ),
    (dict(_attention__value_length=8), r"llama\.attention\.value_length must be the 10 channels of a key; got 8"),
    (dict(_rope__dimension_count=4), r"llama\.rope\.dimension_count must be the 10 channels of a key; got 4"),
    (
        dict(_attention__key_length=None, _attention__head_count=5),
        r"embedding_length must be a multiple of llama\.attention\.head_count where",
    ),
    (dict(_vocab_size=50), r"llama\.vocab_size must be the 48 rows of token_embd\.weight; got 50"),
    (
        dict(_embedding_length=None),
        r"llama\.embedding_length must be a positive integer below 2\*\*31; got none\. The file is damaged",
    ),
    (dict(_block_count=0), r"llama\.block_count must be a positive integer below 2\*\*31; got 0"),
    (dict(_attention__layer_norm_rms_epsilon="x"), r"layer_norm_rms_epsilon must be a finite number; got 'x'"),
    (dict(_rope__freq_base=float("nan")), r"llama\.rope\.freq_base must be a finite number; got nan"),
    (dict(_rope__scaling__type="longrope"), r"llama\.rope\.scaling\.type must be none, linear or yarn; got 'longrope'"),
    (dict(_rope__scaling__attn_factor=2.0), r"llama\.rope\.scaling\.attn_factor must be absent or 1; got 2\.0"),
    (dict(_rope__scaling__yarn_log_multiplier=0.1), r"yarn_log_multiplier must be absent or 0; got 0\.1"),
    (
        FIVE,
        r"rope_freqs\.weight must be the scaling of Llama 3\.1 to 3\.3 \(.*factor 8\.0.*\); its factors \[1\.0, 1\.0, 2\.0, 3\.0, 8\.0\] are others",
    ),
    (
        FIVE | dict(_rope__scaling__factor=2.0),
        r"must scale RoPE once; got the tensor rope_freqs\.weight and llama\.rope\.scaling\.type 'linear'",
    ),
    (dict(tensors={"rope_freqs.weight": np.ones(4)}), r"rope_freqs\.weight must be 5 float32 values; got shape \(4,\)"),
    ({"tokenizer.ggml.eos_token_id": "x"}, r"tokenizer\.ggml\.eos_token_id must be an integer; got 'x'"),
    (
        {"split.count": 3},
        r"must be a whole model; it is one of 3 files\. Merge them first: llama-gguf-split --merge FIRST OUTPUT",
    ),
]


@pytest.mark.parametrize(
    ("metadata", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ",".join(value)
)
def test_what_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        read_config(written(tmp_path, **metadata))


def test_heads_of_qwen3_are_those_of_the_file(tmp_path: Path):
    """Where config.json has no head_dim, Qwen3 has 128 channels; llama.cpp takes the share of a head."""
    keys = dict(_attention__key_length=None, _attention__value_length=None, _rope__dimension_count=None)
    assert read_config(written(tmp_path, QWEN3, **keys))["head_dim"] == 6


def test_sampling_is_recommended(tmp_path: Path):
    sampling = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.penalty_repeat": 1.1,
    }
    settings = load_generation_settings(written(tmp_path, **sampling))
    assert settings.sampling == Sample(0.6, top_k=20, top_p=0.95)
    assert settings.not_available == {"repetition_penalty": 1.1}
    assert load_generation_settings(written(tmp_path)).sampling is None

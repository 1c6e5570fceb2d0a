"""Which Hugging Face models can be read, and what differs between them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from seer_jax.models.config import ModelConfig, RopeConfig
from seer_jax.models.layers import MLP

HFConfig = Mapping[str, Any]


QWEN3_HEAD_DIM = 128  # what transformers takes where a Qwen3 configuration names none


def _llama(hf: HFConfig) -> dict[str, bool]:
    bias = bool(hf.get("attention_bias", False))
    return dict(qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def _qwen2(hf: HFConfig) -> dict[str, bool]:
    return dict(qkv_bias=True)  # the family has it always; no key of the configuration says so


def _qwen3(hf: HFConfig) -> dict[str, bool]:
    bias = bool(hf.get("attention_bias", False))
    return dict(qk_norm=True, qkv_bias=bias, o_bias=bias)


@dataclasses.dataclass(frozen=True)
class Family:
    """What one Hugging Face model type has of its own.

    Attributes:
      fields: values of `ModelConfig` from a parsed `config.json`, besides those that all families read alike.
      mlp: feed-forward module of a layer.
    """

    fields: Callable[[HFConfig], dict[str, Any]]
    mlp: Callable[..., nnx.Module] = MLP


FAMILIES: dict[str, Family] = {"llama": Family(_llama), "qwen2": Family(_qwen2), "qwen3": Family(_qwen3)}


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """ModelConfig of a parsed `config.json`, in the style of transformers 4 or 5.

    Raises:
      ValueError: the model type, the RoPE type, the activation or sliding-window layers are ones that can't be computed
        exactly here, or a required key is missing.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"Unknown model_type {family!r}; expected one of {', '.join(FAMILIES)}.")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in required if key not in hf]
    if missing:
        raise ValueError(f"config.json of a {family} model needs {', '.join(missing)}; got keys {sorted(hf)}.")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"The MLP activation must be 'silu'; got {hf['hidden_act']!r}.")
    if _slides(hf):
        raise ValueError(
            "Sliding-window layers are not supported: expected use_sliding_window false and only full_attention layers."
        )
    heads = int(hf["num_attention_heads"])
    eos = hf.get("eos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        intermediate_size=int(hf["intermediate_size"]),
        num_layers=int(hf["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or (QWEN3_HEAD_DIM if family == "qwen3" else int(hf["hidden_size"]) // heads)),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope=RopeConfig.from_hf(hf),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position_embeddings=int(hf.get("max_position_embeddings") or 8192),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),),
        **FAMILIES[family].fields(hf),
    )


def _slides(hf: HFConfig) -> bool:
    kinds = hf.get("layer_types")
    return any(k != "full_attention" for k in kinds) if kinds else bool(hf.get("use_sliding_window", False))

"""`config.json` of a model that was not read from one."""

from typing import Any

from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.families import config_from_hf

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers (4 and 5) and `config_from_hf` read as this model.

    RoPE is written in the older style, which all versions understand.

    Raises:
      ValueError: the family has no way to say which projections carry a bias.
    """
    hf: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "use_sliding_window": False,
        "eos_token_id": _eos(config.eos_token_ids),
    }
    again = config_from_hf(hf)
    for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        if getattr(again, name) != getattr(config, name):
            raise ValueError(
                f"config.json of a {config.family} model can only mean {name}={getattr(again, name)} here; "
                f"got {getattr(config, name)}. Use a family that has it."
            )
    return hf


def _eos(tokens: tuple[int, ...]) -> int | list[int] | None:
    return list(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    match rope.kind:
        case RopeKind.DEFAULT:
            return None
        case RopeKind.LINEAR:
            own: dict[str, Any] = {}
        case RopeKind.LLAMA3:
            own = dict(
                original_max_position_embeddings=rope.original_max_position,
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
            )
        case RopeKind.YARN:
            own = dict(
                original_max_position_embeddings=rope.original_max_position,
                beta_fast=rope.beta_fast,
                beta_slow=rope.beta_slow,
                truncate=rope.truncate,
                attention_factor=rope.attention_factor,
            )
    return {"rope_type": rope.kind.value, "factor": rope.factor, **own}

"""`config.json` and `generation_config.json` of a GGUF file, from its metadata: what changes the computation is read or refused by name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seer_jax.gguf.header import DAMAGED, GGUFHeader, shown
from seer_jax.models.config import RopeConfig, RopeKind
from seer_jax.models.rope import inverse_frequencies

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
LLAMA3 = dict(original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0)  # of Llama 3.1 to 3.3
_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")

# Keys below the architecture's name that are read.
_READ = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
# Notes about how the model was made.
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")
# Others, with the values that leave the computation as it is; every key that is in none of the lists is refused.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "leading_dense_block_count"), (0,)),
    **dict.fromkeys(("nextn_predict_layers", "pooling_type", "interleave_moe_layer_step"), (0,)),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(
        ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"), (1,)
    ),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """The `config.json` that transformers and `families.config_from_hf` read as the model of a GGUF file.

    Raises:
      ValueError: the architecture is not one of `ARCHITECTURES`, a key is missing or of a wrong type, or one would change what is computed.
    """
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise ValueError(
            f"{header.path} must hold a model; its general.type is {shown(kind)}. Give the file of the model."
        )
    name = header.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{header.path}: general.architecture must be one of {', '.join(ARCHITECTURES)}; got {shown(name)}. Models of other "
            "architectures can't be computed."
        )
    _check_keys(header, name)
    if EMBEDDING not in header.tensors:
        raise ValueError(f"{header.path} must hold the tensor {EMBEDDING}; it has none. {DAMAGED}")
    heads, head_dim = _positive(header, f"{name}.attention.head_count"), _head_dim(header, name)
    values: dict[str, Any] = dict(
        model_type=name,
        architectures=[ARCHITECTURES[name]],
        hidden_act="silu",
        vocab_size=_vocab_size(header, name),
        hidden_size=_positive(header, f"{name}.embedding_length"),
        intermediate_size=_positive(header, f"{name}.feed_forward_length"),
        num_hidden_layers=_positive(header, f"{name}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_positive(header, f"{name}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=header.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        max_position_embeddings=_context(header, name),
        tie_word_embeddings=HEAD not in header.tensors,
        **_tokens(header),
        **_rope(header, name, head_dim),
    )
    if name == "llama":
        values |= dict(attention_bias=_has_bias(header, _ATTENTION), mlp_bias=_has_bias(header, _MLP))
    elif name == "qwen3":
        values |= dict(attention_bias=_has_bias(header, _ATTENTION))
    if name != "llama":
        values |= dict(use_sliding_window=False)
    return values


def generation_config_of(header: GGUFHeader) -> dict[str, Any]:
    """The `generation_config.json`: tokens that end a text, and the sampling that the file recommends."""
    sampling = {name: header.metadata[key] for key, name in _SAMPLING.items() if key in header.metadata}
    return ({"do_sample": True} if sampling else {}) | sampling | _tokens(header)


def end_tokens(header: GGUFHeader) -> tuple[int, ...]:
    """Ids of the tokens that end a text, a turn or a message, as llama.cpp stops at each of them."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(header.get(key, int) for key in keys if key in header.metadata))


def _tokens(header: GGUFHeader) -> dict[str, Any]:
    """Ids of special tokens that the file names."""
    keys = dict(bos_token_id="tokenizer.ggml.bos_token_id", pad_token_id="tokenizer.ggml.padding_token_id")
    tokens: dict[str, Any] = {name: header.get(key, int) for name, key in keys.items() if key in header.metadata}
    if end := end_tokens(header):
        tokens["eos_token_id"] = end[0] if len(end) == 1 else list(end)
    return tokens


def _check_keys(header: GGUFHeader, name: str) -> None:
    """Raises ValueError for a key of the architecture that is not read, unless its value changes nothing."""
    for key, value in header.metadata.items():
        own = key.removeprefix(f"{name}.")
        if own == key or own in _READ or own in _HARMLESS:
            continue
        neutral = _NEUTRAL.get(own, ())
        if not any(type(value) in (type(n), float) and value == n for n in neutral):
            must = " or ".join(["absent", *map(repr, neutral)])
            raise ValueError(
                f"{header.path}: {key} must be {must}; got {shown(value)}, which may change what is computed. Use a model without it."
            )


def _positive(header: GGUFHeader, key: str, default: int | None = None) -> int:
    """A size; a list of sizes, one per layer, where they are equal."""
    value = header.metadata.get(key, default)
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if isinstance(value, list):
        raise ValueError(
            f"{header.path}: {key} must be the same in all layers; got {shown(value)}. Use a model whose layers are alike."
        )
    if type(value) is not int or not 0 < value < 2**31:
        got = "none" if value is None else shown(value)
        raise ValueError(f"{header.path}: {key} must be a positive integer below 2**31; got {got}. {DAMAGED}")
    return value


def _head_dim(header: GGUFHeader, name: str) -> int:
    """Channels of a head, of which keys, values and RoPE must have the same number."""
    width, heads = (_positive(header, f"{name}.{key}") for key in ("embedding_length", "attention.head_count"))
    if f"{name}.attention.key_length" not in header.metadata and width % heads:
        raise ValueError(
            f"{header.path}: {name}.embedding_length must be a multiple of {name}.attention.head_count where attention.key_length is absent; "
            f"got {width} and {heads}. {DAMAGED}"
        )
    dim = _positive(header, f"{name}.attention.key_length", width // heads)
    for key, default in (("attention.value_length", width // heads), ("rope.dimension_count", dim)):
        if (other := _positive(header, f"{name}.{key}", default)) != dim:
            raise ValueError(
                f"{header.path}: {name}.{key} must be the {dim} channels of a key; got {other}. Such models can't be computed."
            )
    return dim


def _vocab_size(header: GGUFHeader, name: str) -> int:
    """Rows of the embedding, which the metadata must not contradict."""
    rows = header.tensors[EMBEDDING].shape[0]
    if (said := _positive(header, f"{name}.vocab_size", rows)) != rows:
        raise ValueError(
            f"{header.path}: {name}.vocab_size must be the {rows} rows of {EMBEDDING}; got {said}. {DAMAGED}"
        )
    return rows


def _context(header: GGUFHeader, name: str) -> int:
    context = _positive(header, f"{name}.context_length")
    window = header.get(f"{name}.attention.sliding_window", int, 0)
    if 0 < window < context:
        raise ValueError(
            f"{header.path}: {name}.attention.sliding_window must be absent, 0 or at least the context of {context} tokens; got {window}. "
            "Use a model without a sliding window."
        )
    return context


def _has_bias(header: GGUFHeader, names: tuple[str, ...]) -> bool:
    return any(f"blk.0.{name}.bias" in header.tensors for name in names)


def _rope(header: GGUFHeader, name: str, head_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`."""
    key = f"{name}.rope.scaling"
    theta = header.get(f"{name}.rope.freq_base", float, 10_000.0)
    factor = header.get(f"{key}.factor", float, header.get(f"{name}.rope.scale_linear", float, 1.0)) or 1.0
    kind = header.get(f"{key}.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{header.path}: {key}.type must be none, linear or yarn; got {shown(kind)}. Such models can't be computed."
        )
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = dict(
            rope_type="yarn", factor=factor, original_max_position_embeddings=_original_context(header, name)
        )
        betas = {beta: f"{key}.yarn_{beta}" for beta in ("beta_fast", "beta_slow")}
        scaling |= {beta: header.get(own, float) for beta, own in betas.items() if own in header.metadata}
    elif kind == "linear" and factor != 1:
        scaling = dict(rope_type="linear", factor=factor)
    if ROPE_FACTORS in header.tensors:
        if scaling is not None:
            raise ValueError(
                f"{header.path} must scale RoPE once; got the tensor {ROPE_FACTORS} and {key}.type {kind!r}. Such models can't be computed."
            )
        scaling = _llama3(header, theta, head_dim, _original_context(header, name, 8192))
    return dict(rope_theta=theta, rope_scaling=scaling)


def _original_context(header: GGUFHeader, name: str, default: int | None = None) -> int:
    default = _positive(header, f"{name}.context_length") if default is None else default
    return _positive(header, f"{name}.rope.scaling.original_context_length", default)


def _llama3(header: GGUFHeader, theta: float, head_dim: int, original: int) -> dict[str, Any] | None:
    """The `rope_scaling` whose frequencies are theta^(-2i/D) divided by the tensor's factors, as llama.cpp writes it for Llama 3.1 to 3.3."""
    factors = _rope_factors(header, head_dim)
    if np.allclose(factors, 1, rtol=1e-6, atol=0):
        return None
    factor = round(float(factors.max()), 4) if np.isfinite(factors).all() else math.inf
    scaling = dict(LLAMA3, rope_type="llama3", factor=factor, original_max_position_embeddings=original)
    if math.isfinite(factor) and factors.min() > 0.5 and factor >= 1:
        rope = RopeConfig(theta, RopeKind.LLAMA3, factor, original)  # with LLAMA3's other factors, its defaults
        plain = inverse_frequencies(RopeConfig(theta), head_dim)
        if np.allclose(plain / factors, inverse_frequencies(rope, head_dim), rtol=1e-5, atol=0):
            return scaling
    raise ValueError(
        f"{header.path}: {ROPE_FACTORS} must be the scaling of Llama 3.1 to 3.3 ({', '.join(f'{k} {v}' for k, v in scaling.items())}); its "
        f"factors {shown(factors.tolist())} are others. Such models can't be computed."
    )


def _rope_factors(header: GGUFHeader, head_dim: int) -> np.ndarray:
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,) or tensor.type != 0 or tensor.offset + 2 * head_dim > header.size:
        raise ValueError(
            f"{header.path}: {ROPE_FACTORS} must be {head_dim // 2} float32 values; got shape {tensor.shape}, ggml type {tensor.type}. {DAMAGED}"
        )
    with Path(header.path).open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(2 * head_dim), np.float32)

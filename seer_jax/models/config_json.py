"""Keys and values of `config.json`: types are checked, and a key that changes what is computed and is not read is refused by name."""

import fnmatch
import math
from collections.abc import Collection, Mapping
from typing import Any

# Keys that change no result of a dense forward pass, whatever their value; they are looked up first.
_HARMLESS = (
    *(
        "seerattn_*",
        "seer_jax_*",
        "*_token_id*",
        "*dropout*",
        "*pdrop",
        "init*",
        "output_*",
        "tokenizer*",
        "transformers*",
    ),
    *(
        "*flash*",
        "*fused*",
        "*_implementation*",
        "*checkpoint*",
        "*loss*",
        "chunk_size_feed_forward",
        "max_window_layers",
        "sequence_bias",
    ),
)
_EMPTY = (False, 0, "", [], {})

# Keys that change results in some family of transformers, or of its neighbours, with the values that leave them as they are. The first
# pattern that fits decides. null always leaves them; what depends on the model is filled in by `_neutral`.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # Scales and caps of activations and logits: granite, minicpm, cohere, gemma, olmo, llama4.
    "attention_multiplier": ("1/sqrt(head_dim)",),
    "query_pre_attn_scalar": ("head_dim",),
    "*multiplier": (1,),
    "*_scaling": (1,),
    "*_scaling_factor": (1,),
    "*_scale": (1,),
    "scale_*": (1,),
    "*residual*": (1, False),
    "*softcap*": (),
    "*soft_cap*": (),
    "clip_qkv": (),
    "*qkv_clip*": (),
    "*temperature_tuning*": _EMPTY,
    # Positions: layers without RoPE, other layouts and other bases.
    "no_rope_layers": ("all layers",),
    "no_rope_layer_interval": ("no_rope_layers",),
    "*nope*": _EMPTY,
    "*interleave*": _EMPTY,
    "*alibi*": _EMPTY,
    "*ntk*": _EMPTY,
    "*logn*": _EMPTY,
    "use_rope": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "*rope_head_dim": ("head_dim",),
    "rope_dim*": ("head_dim",),
    "rotary_dim*": ("head_dim",),
    "*rope*": (1, *_EMPTY),
    "*rotary*": (1, *_EMPTY),
    # What a token attends to.
    "*window*": _EMPTY,
    "*chunk*": _EMPTY,
    "*layer_types": ("full_attention",),
    "*attn_type*": _EMPTY,
    "*sink*": _EMPTY,
    "*bidirectional*": _EMPTY,
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    # Modules that these families do not have.
    "*expert*": _EMPTY,
    "moe_*": _EMPTY,
    "*_moe_*": _EMPTY,
    "mamba*": _EMPTY,
    "ssm*": _EMPTY,
    "*lora_rank": _EMPTY,
    "*output_gate*": _EMPTY,
    "*parallel_attn*": _EMPTY,
    "*_per_layer": _EMPTY,
    "per_layer_*": _EMPTY,
    "*kv_shared*": _EMPTY,
    "pruned_heads": _EMPTY,
    "*bias*": _EMPTY,
    "*qk_norm*": ("qk_norm",),
    "*qk_layer*norm*": ("qk_norm",),
    "*norm_eps*": ("rms_norm_eps",),
    "*norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
    # Other names for sizes and for the activation.
    "*_head_dim": ("head_dim",),
    "kv_channels": ("head_dim",),
    "hidden_act": ("silu", "swish"),
    "*activation*": ("silu", "swish", "swiglu"),
    "*hidden_act": ("silu", "swish"),
}


_WORDS = {
    bool: "true or false",
    int: "an integer below 2**31",
    float: "a finite number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def typed(key: str, value: Any, kind: Any) -> Any:
    """A value of config.json as the type that is meant: int, float, bool, str, list or dict; other types pass.

    Raises:
      ValueError: the value is of another type, such as the text "false", or not finite.
    """
    if kind not in _WORDS:
        return value
    if kind is int or kind is float:
        limit = 2**31 if kind is int else 1e300
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and -limit < value < limit
        fits = number and (kind is float or int(value) == value)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{key} of config.json must be {_WORDS[kind]}; got {_short(value)}.")
    return kind(value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a longer number"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def token_ids(key: str, value: Any) -> tuple[int, ...]:
    """The token ids of a JSON value: one, a list of them, or null.

    Raises:
      ValueError: it is something else.
    """
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{key} must be a token id, a list of token ids or null; got {_short(value)}.")
    return tuple(values)


def check_unquantised(hf: Mapping[str, Any]) -> None:
    """Raises ValueError where config.json says that the weights are quantised."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if hf.get(key):
            method = hf[key].get("quant_method") if isinstance(hf[key], Mapping) else hf[key]
            raise ValueError(
                f"Weights must not be quantised; config.json has a {key} ({method}). Use the bfloat16 checkpoint of this model."
            )


def check_keys(hf: Mapping[str, Any], known: Collection[str], computed: Mapping[str, Any]) -> None:
    """Refuses keys that change what is computed and are not read.

    Args:
      hf: parsed `config.json`.
      known: keys that are read, or that another check decides about.
      computed: what the model computes with: `head_dim`, `rms_norm_eps` and `qk_norm`.

    Raises:
      ValueError: there is such a key with a value that is not neutral.
    """
    for key, value in hf.items():
        if key in known or value is None or _fits(key, _HARMLESS):
            continue
        pattern = next((pattern for pattern in _NEUTRAL if fnmatch.fnmatchcase(key, pattern)), None)
        if pattern is None:
            continue
        neutral = _neutral(hf, pattern, computed)
        if not any(_same(value, allowed) for allowed in neutral):
            allowed = " or ".join(["absent", *(repr(v) for v in neutral if v not in _EMPTY[2:] and v is not False)])
            raise ValueError(
                f"{key} of config.json must be {allowed} in a {hf.get('model_type')} model; got {_short(value)}, which would change what is "
                "computed. Use a checkpoint without it, or, where it is known to do nothing, remove the key."
            )


def _neutral(hf: Mapping[str, Any], pattern: str, computed: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that change nothing, for this model."""
    dim, eps, layers = computed["head_dim"], computed["rms_norm_eps"], hf.get("num_hidden_layers", 0)
    match _NEUTRAL[pattern]:
        case ("1/sqrt(head_dim)",):
            return (dim**-0.5,)
        case ("head_dim",):
            return (dim,)
        case ("rms_norm_eps",):
            return (eps,)
        case ("qk_norm",):
            return (computed["qk_norm"],)
        case ("all layers",):  # 1 marks a layer with RoPE
            return ([1] * layers,)
        case ("no_rope_layers",):  # the interval counts only where there is no list
            return (hf.get("no_rope_layer_interval"),) if hf.get("no_rope_layers") else ()
        case ("full_attention",):
            return ([], ["full_attention"] * layers)
        case values:
            return values


def _fits(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _same(value: Any, neutral: Any) -> bool:
    """Equality in which true is not 1."""
    if isinstance(value, float) and isinstance(neutral, float):
        return math.isclose(value, neutral, rel_tol=1e-6)
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral

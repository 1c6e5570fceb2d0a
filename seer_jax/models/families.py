"""Families of models: one map between the `config.json` of Hugging Face models and `ModelConfig`, in both directions."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from seer_jax.models.config import ModelConfig, RopeConfig
from seer_jax.models.config_json import check_keys, check_unquantised, token_ids, typed
from seer_jax.models.layers import MLP

HFConfig = Mapping[str, Any]

# Keys of config.json that every family has, and the fields that they set.
_COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
}
_DERIVED_FIELDS = ("family", "num_kv_heads", "head_dim", "rope", "eos_token_ids")  # without a key, others decide
_NULL_KEYS = (
    "sliding_window",
    "num_key_value_heads",
)  # where null is a value; elsewhere it means that the key is absent
MISTRAL_WINDOW = 4096  # what transformers takes where a Mistral configuration has no sliding_window
# Keys that are read elsewhere than by `fields_of_keys`, or that a family's `check` decides about.
_READ_KEYS = (
    *(
        "model_type",
        "architectures",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
    ),
    *("layer_types", "sliding_window", "use_sliding_window", "dual_chunk_attention_config"),
)


def check_full_attention(hf: HFConfig) -> None:
    """Raises ValueError where a layer attends within a sliding window.

    Without `layer_types`, a window is one where `use_sliding_window` is true, or absent beside a `sliding_window`.
    """
    kinds = typed("layer_types", hf.get("layer_types") or [], list)
    window = hf.get("sliding_window")
    switch = typed("use_sliding_window", hf.get("use_sliding_window", window is not None), bool)
    slides = (
        any(k != "full_attention" for k in kinds) if kinds else switch and hf.get("sliding_window", True) is not None
    )
    if slides:
        raise ValueError(
            "Every layer must attend to all earlier tokens: config.json must have use_sliding_window false and only full_attention "
            f"layers; got use_sliding_window={hf.get('use_sliding_window')}, sliding_window={window}, layer_types={kinds or None}. Use a "
            "checkpoint without sliding-window layers."
        )


def _check_qwen(hf: HFConfig) -> None:
    """The layers from `max_window_layers` on attend within the window, where `use_sliding_window` is true."""
    off = not typed("use_sliding_window", hf["use_sliding_window"], bool)
    full = typed("max_window_layers", hf["max_window_layers"], int) >= typed(
        "num_hidden_layers", hf["num_hidden_layers"], int
    )
    check_full_attention(dict(hf, use_sliding_window=False) if off or full else hf)


def _check_mistral(hf: HFConfig) -> None:
    check_full_attention(dict(hf, use_sliding_window=False))
    window = hf.get("sliding_window", MISTRAL_WINDOW)
    if window is not None:
        default = "" if "sliding_window" in hf else ", the default where the key is absent"
        raise ValueError(
            f"A mistral model must attend without a window: sliding_window of config.json must be null; got {window}{default}. Use "
            "a checkpoint without a window, such as Mistral 7B v0.2 or later."
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    A new family is one such entry, `register_family(Family(...))`: its models then load, run, decode, generate and distil.

    Attributes:
      model_type: as `config.json` names it.
      architecture: class of transformers, as `config.json` names it.
      keys: from keys of `config.json` to the field, or the fields, of the configuration that they set, besides the keys that all
        families have. A key that is absent leaves the fields at their defaults; a field without one makes its key required.
      constants: fields that have one value in the whole family, which no key says.
      defaults: values of absent keys, where they are not those of the fields.
      harmless: keys that change nothing in this family, whatever their value; see `config_json.check_keys`.
      written: further keys that `config_to_hf` writes.
      head_dim: where `config.json` names none; None: hidden_size / num_attention_heads.
      check: raises ValueError for a `config.json` of a model that can't be computed exactly here.
      config: class of the configuration, `ModelConfig` or one with further fields.
      mlp: feed-forward module of a layer, made by `mlp(config, dtype=..., rngs=...)`; see `layers.MLP`.
      rules: tensor names of the checkpoint with the paths of the parameters that hold them, such as
        ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers.mlp.up"), besides those of `convert.rules.BASE_RULES`.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    written: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(use_sliding_window=False))
    head_dim: int | None = None
    check: Callable[[HFConfig], None] = check_full_attention
    config: type[ModelConfig] = ModelConfig
    mlp: Callable[..., nnx.Module] = MLP
    rules: tuple[tuple[str, str], ...] = ()

    @property
    def fields_of_keys(self) -> dict[str, tuple[str, ...]]:
        """All keys, with the fields that each sets."""
        keys = {**_COMMON_KEYS, **self.keys}
        return {key: (fields,) if isinstance(fields, str) else fields for key, fields in keys.items()}

    @property
    def required_keys(self) -> list[str]:
        """Keys without which there is no configuration."""
        fields = dataclasses.fields(self.config)
        needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING} - {*_DERIVED_FIELDS}
        return [key for key, names in self.fields_of_keys.items() if needed.intersection(names)]


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes a family known by its model type.

    Raises:
      ValueError: another family has the model type.
    """
    if FAMILIES.get(family.model_type, family) != family:
        raise ValueError(
            f"A family's model_type must be its own; got {family.model_type!r}, which exists. Choose another model_type."
        )
    FAMILIES[family.model_type] = family
    return family


# What transformers takes for absent keys.
_QWEN_DEFAULTS = dict(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)

register_family(
    Family(
        "llama",
        "LlamaForCausalLM",
        keys={"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": "mlp_bias"},
        defaults=dict(max_position_embeddings=2048),
    )
)
register_family(
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        constants=dict(qkv_bias=True),
        defaults=_QWEN_DEFAULTS,
        harmless=("attention_bias", "qkv_bias"),  # its projections have theirs in any case
        check=_check_qwen,
    )
)
register_family(
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        keys={"attention_bias": ("qkv_bias", "o_bias")},
        constants=dict(qk_norm=True),
        defaults=_QWEN_DEFAULTS,
        head_dim=128,
        check=_check_qwen,
    )
)
register_family(
    Family(
        "mistral",
        "MistralForCausalLM",
        defaults=dict(num_key_value_heads=8, max_position_embeddings=131072),
        written=dict(sliding_window=None),
        check=_check_mistral,
    ),
)


def family_of(model_type: str | None) -> Family:
    """The family of a model type.

    Raises:
      ValueError: it is not known.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"Unknown model_type {model_type!r}; expected one of {', '.join(FAMILIES)}. Other families need an entry, see "
            "seer_jax.models.families.register_family."
        )
    return FAMILIES[model_type]


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """The configuration that a parsed `config.json` describes, in the style of transformers 4 or 5.

    Every key that changes what is computed is read or refused by name; so are values of a wrong type.

    Raises:
      ValueError: the model can't be computed exactly here, or a required key is missing. The message names the key.
    """
    check_unquantised(hf)
    name = hf.get("model_type")
    family = family_of(name if name is None else typed("model_type", name, str))
    missing = [key for key in family.required_keys if hf.get(key) is None]
    if missing:
        raise ValueError(
            f"config.json of a {family.model_type} model needs {', '.join(missing)}; got keys {sorted(hf)}."
        )
    _check_architecture(hf, family)
    if hf.get("hidden_act") not in (None, "silu", "swish"):
        raise ValueError(f"The MLP activation must be 'silu'; got {hf['hidden_act']!r}, hidden_act of config.json.")
    hf = {**family.defaults, **{key: value for key, value in hf.items() if value is not None or key in _NULL_KEYS}}
    family.check(hf)
    config = family.config(
        family=family.model_type,
        rope=RopeConfig.from_hf(hf),
        eos_token_ids=token_ids("eos_token_id of config.json", hf.get("eos_token_id")),
        **_values(hf, family),
        **family.constants,
    )
    computed = dict(head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps, qk_norm=config.qk_norm)
    check_keys(hf, {*_READ_KEYS, *family.fields_of_keys, *family.harmless, *family.written}, computed)
    return config


def _values(hf: HFConfig, family: Family) -> dict[str, Any]:
    """The fields that keys set."""
    kinds = {field.name: field.type for field in dataclasses.fields(family.config)}
    values = {
        name: typed(key, hf[key], kinds[name])
        for key, names in family.fields_of_keys.items()
        if hf.get(key) is not None
        for name in names
    }
    values.setdefault("num_kv_heads", values["num_heads"])
    if "head_dim" not in values:
        values["head_dim"] = family.head_dim or _even_share(values["hidden_size"], values["num_heads"])
    # Beyond this length such models attend in chunks, which is another computation; up to it they attend as all others.
    if chunks := hf.get("dual_chunk_attention_config"):
        name = "original_max_position_embeddings"
        exact = typed(name, typed("dual_chunk_attention_config", chunks, dict).get(name), int)
        values["max_position_embeddings"] = min(exact, values["max_position_embeddings"])
    return values


def _even_share(width: int, heads: int) -> int:
    if heads > 0 and width % heads:
        raise ValueError(
            f"hidden_size of config.json must be a multiple of num_attention_heads where head_dim is absent; got {width} and {heads}."
        )
    return width // max(heads, 1)


def _check_architecture(hf: HFConfig, family: Family) -> None:
    """Raises ValueError where `architectures` names no class of the family."""
    names = hf.get("architectures") or []
    names = [names] if isinstance(names, str) else typed("architectures", names, list)
    stem = family.architecture.removesuffix("ForCausalLM").lower()
    if names and not any(re.search(rf"{stem}(for|model|$)", str(name).lower()) for name in names):
        raise ValueError(
            f"architectures of config.json must name {family.architecture} in a {family.model_type} model; got {names}. Set model_type "
            "to the family of the architecture; where the two are known to be one, correct architectures."
        )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that transformers (4 and 5) and `config_from_hf` read as this model.

    Raises:
      ValueError: the family has no key, or not this value, for a field.
    """
    family = family_of(config.family)
    eos = config.eos_token_ids
    hf: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        **{key: getattr(config, names[-1]) for key, names in family.fields_of_keys.items()},
        **config.rope.to_hf(),
        **family.written,
    }
    again = config_from_hf(hf)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if ours != theirs and field.name != "rope":  # RoPE without a scaling has no original context to come back
            raise ValueError(
                f"config.json of a {config.family} model can only mean {field.name}={theirs} here; got {ours}. Use a family that "
                "has it."
            )
    return hf

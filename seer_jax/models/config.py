"""Configurations of models: frozen dataclasses that check themselves."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pallas_kernels.devices import default_device
from seer_jax.checks import check_positive
from seer_jax.models.config_json import typed
from seer_jax.settings import check_types


class DType(enum.StrEnum):
    """Number format of the base model's weights and arithmetic; JAX takes it as a dtype. Gates compute in float32 always."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @classmethod
    def of(cls, dtype: Any) -> "DType":
        """The one that a name, a NumPy or a JAX dtype means.

        Raises:
          ValueError: it is another one, or none.
        """
        try:
            return cls(np.dtype(dtype).name)
        except (TypeError, ValueError):
            raise ValueError(f"dtype must be {' or '.join(cls)}; got {dtype!r}.") from None

    @classmethod
    def default(cls) -> "DType":
        """bfloat16; float32 where the default device is a CPU."""
        return cls.FLOAT32 if default_device().platform == "cpu" else cls.BFLOAT16


class RopeKind(enum.StrEnum):
    """How RoPE frequencies are scaled; the names are those of Hugging Face configurations."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


MAX_LAYERS = 10_000  # no model has as many; a damaged number must not be counted up to
# Keys that a scaling must have; defaults in their place would give a model that runs and is wrong.
_ROPE_NEEDS = {
    RopeKind.DEFAULT: (),
    RopeKind.LINEAR: ("factor",),
    RopeKind.LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeKind.YARN: ("factor",),
}
# Further keys that are read or known to change nothing. "finetuned" is a note of the first YaRN models.
_ROPE_KNOWN = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
)
_YARN_KNOWN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_ROPE_NEUTRAL = {
    "attn_factor": 1,
    "extrapolation_factor": 1,
    "factor": 1,
}  # values at which keys of other readers change nothing


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies, > 0.
      kind: how they are scaled.
      factor: by how much the context is stretched (linear, llama3, yarn), >= 1.
      original_max_position: context length before stretching, tokens (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3 alone.
      beta_fast, beta_slow, truncate, attention_factor: yarn alone. `attention_factor` scales cos and sin.
    """

    theta: float = 10_000.0
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "theta", "original_max_position", "attention_factor", "beta_fast", "beta_slow")
        if self.factor < 1:
            raise ValueError(f"A RoPE scaling factor must be at least 1; got {self.factor}.")
        if self.kind is RopeKind.LLAMA3 and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "llama3 RoPE scaling needs low_freq_factor < high_freq_factor; "
                f"got {self.low_freq_factor} and {self.high_freq_factor}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads RoPE as transformers does: `rope_scaling` where it has entries, otherwise `rope_parameters`.

        The base and the rotated share stand in them or beside them; the inner ones come first. An original context beside them comes
        before an inner one.

        Raises:
          ValueError: the type is not one of `RopeKind`, or a key is missing, of a wrong type, or would change what is computed and is not
            read.
        """
        raw = _rope_entries(config)
        kind = _rope_kind(raw)
        beside = config.get("original_max_position_embeddings") if kind in (RopeKind.LLAMA3, RopeKind.YARN) else None
        if beside is not None:
            raw |= dict(original_max_position_embeddings=beside)
        _check_rope_keys(raw, kind)
        partial = next(
            (c["partial_rotary_factor"] for c in (raw, config) if c.get("partial_rotary_factor") is not None), 1
        )
        if partial != 1:
            raise ValueError(f"RoPE must rotate all channels of a head; got partial_rotary_factor {partial}.")
        theta = next((c["rope_theta"] for c in (raw, config) if c.get("rope_theta") is not None), 10_000.0)
        original = raw.get("original_max_position_embeddings")
        if original is None:
            original = 8192 if config.get("max_position_embeddings") is None else config["max_position_embeddings"]
        factor = typed("factor", raw["factor"], float) if "factor" in _ROPE_NEEDS[kind] else 1.0
        keys = _ROPE_NEEDS[kind] + (_YARN_KNOWN if kind is RopeKind.YARN else ())
        kinds = {field.name: field.type for field in dataclasses.fields(cls)} | dict(factor=None, attention_factor=None)
        given = {k: typed(k, raw[k], kinds[k]) for k in keys if kinds.get(k) and raw.get(k) is not None}
        return cls(
            theta=typed("rope_theta", theta, float),
            kind=kind,
            factor=factor,
            original_max_position=typed("original_max_position_embeddings", original, int),
            attention_factor=_yarn_attention_factor(raw, factor) if kind is RopeKind.YARN else 1.0,
            **given,
        )

    def to_hf(self) -> dict[str, Any]:
        """Keys `rope_theta` and `rope_scaling` of a HF configuration, the older style, which all versions of transformers read."""
        match self.kind:
            case RopeKind.DEFAULT:
                return {"rope_theta": self.theta, "rope_scaling": None}
            case RopeKind.LINEAR:
                own: dict[str, Any] = {}
            case RopeKind.LLAMA3:
                own = dict(
                    original_max_position_embeddings=self.original_max_position,
                    low_freq_factor=self.low_freq_factor,
                    high_freq_factor=self.high_freq_factor,
                )
            case RopeKind.YARN:
                own = dict(
                    original_max_position_embeddings=self.original_max_position,
                    beta_fast=self.beta_fast,
                    beta_slow=self.beta_slow,
                    truncate=self.truncate,
                    attention_factor=self.attention_factor,
                )
        return {"rope_theta": self.theta, "rope_scaling": {"rope_type": self.kind.value, "factor": self.factor, **own}}


def _rope_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `rope_scaling`, or of `rope_parameters` where it has none."""
    both = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    for key, entries in zip(("rope_scaling", "rope_parameters"), both, strict=True):
        if not isinstance(entries, Mapping):
            raise ValueError(f"{key} of config.json must be an object or null; got {entries!r}.")
    scaling, parameters = both
    for key in ("rope_theta", "partial_rotary_factor") if scaling else ():
        if parameters.get(key) is not None and scaling.get(key) is None and config.get(key) is None:
            raise ValueError(
                f"{key} must stand where it is read: config.json has rope_scaling, which replaces rope_parameters and its {key} "
                f"{parameters[key]}. Put {key} into rope_scaling, or move all entries into rope_parameters."
            )
    return dict(scaling or parameters)


def _rope_kind(raw: Mapping[str, Any]) -> RopeKind:
    name = raw.get("rope_type") or raw.get("type") or "default"
    if name not in list(RopeKind):
        raise ValueError(
            f"The RoPE type must be one of {', '.join(RopeKind)}; got {name!r}. Models of other types can't be computed exactly."
        )
    return RopeKind(name)


def _check_rope_keys(raw: Mapping[str, Any], kind: RopeKind) -> None:
    """Raises ValueError where a key is missing, or would change what is computed and is not read."""
    missing = [key for key in _ROPE_NEEDS[kind] if raw.get(key) is None]
    if missing:
        raise ValueError(
            f"RoPE of type {kind.value!r} needs {', '.join(missing)}; got {sorted(raw)}. Complete config.json."
        )
    if kind is RopeKind.YARN and raw.get("attn_factor") not in (None, 1):
        factor, scale = typed("factor", raw["factor"], float), typed("attn_factor", raw["attn_factor"], float)
        raise ValueError(
            f"attn_factor of config.json must be absent, as vLLM multiplies the scale of cos and sin by it and transformers ignores it; "
            f"got {scale}. Write attention_factor {scale * _magnitude(factor):.6g} in its place to compute as vLLM, or remove it to compute "
            "as transformers."
        )
    known = (*_ROPE_KNOWN, *_ROPE_NEEDS[kind], *(_YARN_KNOWN if kind is RopeKind.YARN else ()))
    unknown = {k: v for k, v in raw.items() if k not in known and v is not None and v != _ROPE_NEUTRAL.get(k)}
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise ValueError(
            f"RoPE of type {kind.value!r} must have no keys but {', '.join(dict.fromkeys(known))}; got {listed}. Remove from "
            "config.json what is known to do nothing."
        )


def _yarn_attention_factor(raw: Mapping[str, Any], factor: float) -> float:
    """0.1 m ln(factor) + 1, or the ratio of two such terms where `mscale` and `mscale_all_dim` are given (YaRN, sec. 3.4)."""
    given = {
        k: typed(k, raw[k], float) for k in ("attention_factor", "mscale", "mscale_all_dim") if raw.get(k) is not None
    }
    if "attention_factor" in given:
        return given["attention_factor"]
    if given.get("mscale") and given.get("mscale_all_dim"):
        return _magnitude(factor, given["mscale"]) / _magnitude(factor, given["mscale_all_dim"])
    return _magnitude(factor)


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder; families differ in these values, and some in the module of their MLP.

    Attributes:
      family: Hugging Face `model_type`.
      vocab_size, hidden_size, intermediate_size: widths.
      num_layers (L), num_heads (H), num_kv_heads (K), head_dim (D): K divides H, D is even.
      qkv_bias, o_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm over D on queries and keys before RoPE (Qwen3).
      tie_word_embeddings: the output head is the embedding.
      max_position_embeddings: longest context the model was trained for, tokens; RoPE scalings may stretch it, see `context`.
      eos_token_ids: tokens that end a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("rms_norm_eps", "max_position_embeddings"),
        )
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"ModelConfig.num_layers must be at most {MAX_LAYERS}; got {self.num_layers}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "Key/value heads must divide the query heads (each serves a group of equal size); "
                f"got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs of channels, so head_dim must be even; got {self.head_dim}.")

    @property
    def group_size(self) -> int:
        """G = H / K: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def with_yarn(self, factor: float) -> "ModelConfig":
        """This model with its context stretched by YaRN (arXiv 2309.00071), which it is then to be fine-tuned for.

        Args:
          factor: by how much, > 1; the context becomes `int(context * factor)`.

        Raises:
          ValueError: the factor is at most 1, or so large that `config.json` cannot hold the context, or RoPE is scaled already.
        """
        if not 1 < factor < math.inf:
            raise ValueError(f"A YaRN factor must be a number above 1; got {factor}.")
        if self.rope.kind is not RopeKind.DEFAULT:
            raise ValueError(
                f"YaRN must start from a model whose RoPE is not scaled; got one of type {self.rope.kind.value!r}, whose context is "
                f"{self.context} tokens. Leave out `yarn_factor`, or take the model that this one was made from."
            )
        original = self.max_position_embeddings
        if original * factor >= 2**31:
            raise ValueError(
                f"A YaRN factor must leave a context below 2**31 tokens; got {factor}, times {original} tokens. Lower it."
            )
        rope = dataclasses.replace(
            self.rope,
            kind=RopeKind.YARN,
            factor=float(factor),
            original_max_position=original,
            attention_factor=_magnitude(factor),
        )
        return dataclasses.replace(self, rope=rope, max_position_embeddings=int(original * factor))

    @property
    def context(self) -> int:
        """Tokens that the model may take, prompt and new ones together.

        `max_position_embeddings`, except where RoPE stretches it: times the factor for linear scaling, and
        `original_max_position` times the factor for YaRN (Qwen3 with its card's factor of 4: 32768 * 4 = 131072, whatever
        `max_position_embeddings` says). Llama 3.x states the stretched length itself. vLLM derives its `max_model_len` alike.
        """
        match self.rope.kind:
            case RopeKind.LINEAR:
                return int(self.max_position_embeddings * self.rope.factor)
            case RopeKind.YARN:
                return int(self.rope.original_max_position * self.rope.factor)
        return self.max_position_embeddings

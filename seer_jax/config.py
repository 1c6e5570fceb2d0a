"""What a model and its gates look like: frozen dataclasses that check themselves."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import jax


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive; got {getattr(config, name)}.")


def check_at_least(least: int, config: Any, *names: str) -> None:
    """Refuses a configuration in which a setting of these names is smaller.

    Raises:
      ValueError: one is.
    """
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} is at least {least}; got {getattr(config, name)}.")


class DType(enum.StrEnum):
    """Number format of the base model's weights and arithmetic; JAX takes it as a dtype. Gates compute in float32 always."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @classmethod
    def default(cls) -> "DType":
        """bfloat16, on a CPU float32."""
        return cls.FLOAT32 if jax.default_backend() == "cpu" else cls.BFLOAT16


class RopeKind(enum.StrEnum):
    """How RoPE frequencies are scaled; the names are those of Hugging Face configurations."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


# Without these a scaling means nothing; a default in their place would give a model that runs and is wrong.
_ROPE_NEEDS = {
    RopeKind.DEFAULT: (),
    RopeKind.LINEAR: ("factor",),
    RopeKind.LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeKind.YARN: ("factor",),
}


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
        _positive(self, "theta", "original_max_position", "attention_factor")
        if self.factor < 1:
            raise ValueError(f"A RoPE scaling factor is at least 1; got {self.factor}.")
        if self.kind is RopeKind.LLAMA3 and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "llama3 RoPE scaling needs low_freq_factor < high_freq_factor; "
                f"got {self.low_freq_factor} and {self.high_freq_factor}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) of a HF configuration."""
        raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(raw.get("rope_theta") or config.get("rope_theta") or 10_000.0)
        name = raw.get("rope_type") or raw.get("type") or "default"
        if name not in list(RopeKind):
            raise ValueError(
                f"Unknown RoPE type {name!r}; expected one of {', '.join(RopeKind)}. A model that needs another one "
                "can't be computed exactly, so it is refused."
            )
        kind = RopeKind(name)
        missing = [key for key in _ROPE_NEEDS[kind] if raw.get(key) is None]
        if missing:
            raise ValueError(
                f"RoPE of type {name!r} needs {', '.join(missing)}; got {sorted(raw)}. Complete config.json."
            )
        partial = raw.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        if partial != 1:
            raise ValueError(f"RoPE must rotate all channels of a head; got partial_rotary_factor {partial}.")
        context = int(config.get("max_position_embeddings") or 8192)
        original = int(raw.get("original_max_position_embeddings") or context)
        factor = float(raw["factor"]) if "factor" in _ROPE_NEEDS[kind] else 1.0
        keys = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
        given = {k: raw[k] for k in keys if raw.get(k) is not None}
        attention = _yarn_attention_factor(raw, factor) if kind is RopeKind.YARN else 1.0
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            original_max_position=original,
            attention_factor=attention,
            **given,
        )


def _yarn_attention_factor(raw: Mapping[str, Any], factor: float) -> float:
    """0.1 m ln(factor) + 1, or the ratio of two such terms where `mscale` and `mscale_all_dim` are given (YaRN, sec. 3.4)."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if raw.get("attention_factor") is not None:
        return float(raw["attention_factor"])
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        return magnitude(float(raw["mscale"])) / magnitude(float(raw["mscale_all_dim"]))
    return magnitude(1.0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder; the families differ in these values alone.

    Attributes:
      family: Hugging Face `model_type`.
      vocab_size, hidden_size, intermediate_size: widths.
      num_layers (L), num_heads (H), num_kv_heads (K), head_dim (D): K divides H, D is even.
      qkv_bias, o_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm over D on queries and keys before RoPE (Qwen3).
      tie_word_embeddings: the output head is the embedding.
      max_position_embeddings: longest context the model was made for, tokens.
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
        _positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("rms_norm_eps", "max_position_embeddings"),
        )
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


class Pool(enum.StrEnum):
    """How a block of tokens becomes one vector. Pooled vectors are concatenated in the order of this list."""

    MAX = "max"
    MIN = "min"
    AVG = "avg"


class QueryReduction(enum.StrEnum):
    """How the decode gate reduces the G query heads of a group to one vector; the names are those of the release."""

    PROJ = "Qproj"
    AVG_PROJ = "Qavgproj"
    AVG = "Qavg"


def _check_pooling(side: str, kinds: tuple[Pool, ...]) -> None:
    if not kinds or list(kinds) != [p for p in Pool if p in kinds]:
        raise ValueError(
            f"{side} pooling is a non-empty subset of (max, min, avg), each once and in that order; got {kinds}."
        )


@dataclasses.dataclass(frozen=True)
class PrefillGateConfig:
    """The gate of SeerAttention (arXiv 2410.13276, sec. 3.1): one choice of blocks per query head and query block.

    Attributes:
      block_size (b): tokens per block, a power of two from 16 to 128.
      gate_dim (C): channels of the gate's queries and keys, even. The release calls it `gate_hidden_size`.
      q_pooling, k_pooling: see `Pool`.
      force_double: keep two projections where one would do.
    """

    block_size: int = 64
    gate_dim: int = 128
    q_pooling: tuple[Pool, ...] = (Pool.AVG,)
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    force_double: bool = False

    def __post_init__(self) -> None:
        _check_gate_sizes(self.block_size, self.gate_dim)
        _check_pooling("Query", self.q_pooling)
        _check_pooling("Key", self.k_pooling)

    def one_linear(self, head_dim: int) -> bool:
        """Whether pooled queries are used as they are and keys get one projection per query head."""
        return len(self.q_pooling) == 1 and self.gate_dim == head_dim and not self.force_double


@dataclasses.dataclass(frozen=True)
class DecodeGateConfig:
    """The gate of SeerAttention-R (arXiv 2506.08889, sec. 3): one choice of blocks per key/value head and query token.

    Attributes:
      block_size (b), gate_dim (C), k_pooling: as in `PrefillGateConfig`.
      query_reduction: how a group's query heads become one vector. `AVG` needs gate_dim == head_dim.
      use_qk_norm: RMSNorm over C on the gate's queries and keys, before RoPE.
      use_rope: rotate queries at their token, keys at the first token of their block.
      start_layer: layers before it attend densely while decoding; a policy can ask for more (`dense_layers`).
    """

    block_size: int = 64
    gate_dim: int = 128
    query_reduction: QueryReduction = QueryReduction.PROJ
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    use_qk_norm: bool = True
    use_rope: bool = True
    start_layer: int = 0

    def __post_init__(self) -> None:
        _check_gate_sizes(self.block_size, self.gate_dim)
        _check_pooling("Key", self.k_pooling)
        if self.start_layer < 0:
            raise ValueError(f"start_layer counts the dense first layers, so it is at least 0; got {self.start_layer}.")


GateConfig = PrefillGateConfig | DecodeGateConfig


class Gates(enum.StrEnum):
    """Which gates a run distils; both come from the same dense pass."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


def _check_gate_sizes(block_size: int, gate_dim: int) -> None:
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size is one of 16, 32, 64, 128 tokens; got {block_size}.")
    if gate_dim < 2 or gate_dim % 2:
        raise ValueError(f"gate_dim must be even and positive, since RoPE rotates pairs of channels; got {gate_dim}.")

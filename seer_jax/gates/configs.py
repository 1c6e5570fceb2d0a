"""Configurations of gates: frozen dataclasses that check themselves."""

import dataclasses
import enum
from typing import Any

from seer_jax.settings import check_types


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
            f"{side} pooling must be a non-empty subset of (max, min, avg), each once and in that order; got {kinds}."
        )


@dataclasses.dataclass(frozen=True)
class PrefillGateConfig:
    """The gate of SeerAttention (arXiv 2410.13276, sec. 3.1): one choice of blocks per query head and query block.

    Attributes:
      block_size (b): tokens per block, a power of two from 16 to 128.
      gate_dim (C): channels of the gate's queries and keys, even. The release calls it gate_hidden_size.
      q_pooling, k_pooling: how the tokens of a block become one vector; several kinds are concatenated.
      force_double: keep two projections where one would do.
    """

    block_size: int = 64
    gate_dim: int = 128
    q_pooling: tuple[Pool, ...] = (Pool.AVG,)
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    force_double: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        _check_gate_sizes(self)
        _check_pooling("Query", self.q_pooling)
        _check_pooling("Key", self.k_pooling)

    def one_linear(self, head_dim: int) -> bool:
        """Whether pooled queries are used as they are and keys get one projection per query head."""
        return len(self.q_pooling) == 1 and self.gate_dim == head_dim and not self.force_double


@dataclasses.dataclass(frozen=True)
class DecodeGateConfig:
    """The gate of SeerAttention-R (arXiv 2506.08889, sec. 3): one choice of blocks per key/value head and query token.

    Attributes:
      block_size (b), gate_dim (C), k_pooling: as those of a prefill gate.
      query_reduction: how a group's query heads become one vector. Qavg needs gate_dim == head_dim.
      use_qk_norm: RMSNorm over C on the gate's queries and keys, before RoPE.
      use_rope: rotate queries at their token, keys at the first token of their block.
      start_layer: layers before it attend densely while decoding; a policy can ask for more (dense_layers).
    """

    block_size: int = 64
    gate_dim: int = 128
    query_reduction: QueryReduction = QueryReduction.PROJ
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    use_qk_norm: bool = True
    use_rope: bool = True
    start_layer: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        _check_gate_sizes(self)
        _check_pooling("Key", self.k_pooling)
        if self.start_layer < 0:
            raise ValueError(
                f"start_layer, the number of dense first layers, must be at least 0; got {self.start_layer}."
            )


GateConfig = PrefillGateConfig | DecodeGateConfig


class TrainedGates(enum.StrEnum):
    """Which gates a run distils; both come from the same dense pass."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes of the model that hold them."""
        both = ("prefill_gate", "decode_gate")
        return both if self is TrainedGates.BOTH else (f"{self}_gate",)


def _check_gate_sizes(config: Any) -> None:
    name = type(config).__name__
    if config.block_size not in (16, 32, 64, 128):
        raise ValueError(f"{name}.block_size must be one of 16, 32, 64, 128 tokens; got {config.block_size}.")
    if config.gate_dim < 2 or config.gate_dim % 2:
        raise ValueError(
            f"{name}.gate_dim must be even and positive, since RoPE rotates pairs of channels; got {config.gate_dim}."
        )

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
    """How the decode gate makes queries of the G query heads of a group.

    The release's kinds reduce them to one vector. Qheads projects each to a query of its own; their shares of the blocks are joined.
    """

    PROJ = "Qproj"
    AVG_PROJ = "Qavgproj"
    AVG = "Qavg"
    HEADS = "Qheads"


class Join(enum.StrEnum):
    """What a block's share is made of: the shares of its key vectors."""

    SUM = "sum"
    MAX = "max"


class HeadJoin(enum.StrEnum):
    """What a group's share of a block is made of: the shares of its query heads."""

    MEAN = "mean"
    MAX = "max"


def _check_pooling(config: Any, side: str) -> None:
    name, kinds = f"{type(config).__name__}.{side}_pooling", getattr(config, f"{side}_pooling")
    if not kinds or list(kinds) != [p for p in Pool if p in kinds]:
        raise ValueError(
            f"{name} must be some of max, min, avg, each once and in that order; got {', '.join(kinds) or 'none'}."
        )


@dataclasses.dataclass(frozen=True)
class PrefillGateConfig:
    """The gate of SeerAttention (arXiv 2410.13276, sec. 3.1): one choice of blocks per query head and query block.

    Attributes:
      block_size (b): tokens per block, a power of two from 16 to 128.
      gate_dim (C): channels of the gate's queries and keys, even. The release calls it gate_hidden_size.
      q_pooling: how the query tokens of a pool become one vector; several kinds are concatenated.
      k_pooling: likewise of keys.
      force_double: keep two projections where one would do.
      q_pool_size (s_q): tokens pooled to one query, a power of two up to the block size. None: the block size, as in the release. With
        smaller pools a row of blocks has several queries, and takes the largest share that one of them gives a block.
      k_pool_size (s_k): tokens pooled to one key, likewise. With smaller pools a block has several keys, and its share of a query's
        softmax is made of theirs.
      join: a block's share is the sum of its keys' shares, or the largest (max); where k_pool_size is below the block size.
    """

    block_size: int = 64
    gate_dim: int = 128
    q_pooling: tuple[Pool, ...] = (Pool.AVG,)
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    force_double: bool = False
    q_pool_size: int | None = None
    k_pool_size: int | None = None
    join: Join = Join.SUM

    def __post_init__(self) -> None:
        check_types(self)
        _check_gate_sizes(self)
        _check_pooling(self, "q")
        _check_pooling(self, "k")
        _check_pool_size(self, "q")
        _check_pool_size(self, "k")
        _check_join(self)

    @property
    def query_pool(self) -> int:
        """s_q, tokens per query."""
        return self.block_size if self.q_pool_size is None else self.q_pool_size

    @property
    def key_pool(self) -> int:
        """s_k, tokens per key."""
        return self.block_size if self.k_pool_size is None else self.k_pool_size

    @property
    def queries_per_row(self) -> int:
        """m_q, queries per row of blocks."""
        return self.block_size // self.query_pool

    @property
    def keys_per_block(self) -> int:
        """m_k."""
        return self.block_size // self.key_pool

    def finer_than_release(self) -> dict[str, str]:
        """Settings that the release does not have: what each would need to be there, by name; empty for the release's kinds."""
        return _smaller_pools(self, "q_pool_size", "k_pool_size")

    def one_linear(self, head_dim: int) -> bool:
        """Whether pooled queries are used as they are and keys get one projection per query head."""
        return len(self.q_pooling) == 1 and self.gate_dim == head_dim and not self.force_double


@dataclasses.dataclass(frozen=True)
class DecodeGateConfig:
    """The gate of SeerAttention-R (arXiv 2506.08889, sec. 3): one choice of blocks per key/value head and query token.

    Attributes:
      block_size (b): tokens per block, a power of two from 16 to 128.
      gate_dim (C): channels of the gate's queries and keys, even. The release calls it gate_hidden_size.
      k_pooling: how the key tokens of a pool become one vector; several kinds are concatenated.
      query_reduction: how a group's query heads become one vector, or (Qheads) that each keeps a query of its own. Qavg needs
        gate_dim == head_dim.
      use_qk_norm: RMSNorm over C on the gate's queries and keys, before RoPE. None: as in the release, True; False with Qheads, whose
        queries and keys start as the model's own, which unit lengths would only flatten.
      use_rope: rotate queries at their token, keys at the first token of their pool.
      start_layer: layers before it attend densely while decoding; a policy can ask for more (dense_layers).
      k_pool_size (s_k): tokens pooled to one key, a power of two up to the block size. None: the block size, as in the release. The
        cache keeps b / s_k keys of C channels per completed block and key/value head, beside the block's 2 b D channels of keys and
        values.
      join: a block's share is the sum of its keys' shares, or the largest (max); where k_pool_size is below the block size.
      heads: a group's share of a block is the mean of its query heads' shares, or the largest (max); with Qheads alone.
    """

    block_size: int = 64
    gate_dim: int = 128
    query_reduction: QueryReduction = QueryReduction.PROJ
    k_pooling: tuple[Pool, ...] = (Pool.MAX, Pool.MIN, Pool.AVG)
    use_qk_norm: bool | None = None
    use_rope: bool = True
    start_layer: int = 0
    k_pool_size: int | None = None
    join: Join = Join.SUM
    heads: HeadJoin = HeadJoin.MEAN

    def __post_init__(self) -> None:
        check_types(self)
        if self.use_qk_norm is not self.has_head_queries:  # as by default
            object.__setattr__(self, "use_qk_norm", None)
        _check_gate_sizes(self)
        _check_pooling(self, "k")
        _check_pool_size(self, "k")
        _check_join(self)
        if self.heads is not HeadJoin.MEAN and not self.has_head_queries:
            raise ValueError(
                f"DecodeGateConfig.heads={self.heads} joins the query heads' own shares, so query_reduction must be Qheads; "
                f"got {self.query_reduction}. Set query_reduction=Qheads, or leave DecodeGateConfig.heads out."
            )
        if self.start_layer < 0:
            raise ValueError(
                f"start_layer, the number of dense first layers, must be at least 0; got {self.start_layer}."
            )

    @property
    def has_head_queries(self) -> bool:
        """Whether each query head has a query of its own."""
        return self.query_reduction is QueryReduction.HEADS

    @property
    def normalizes(self) -> bool:
        """Whether queries and keys get an RMSNorm."""
        return not self.has_head_queries if self.use_qk_norm is None else self.use_qk_norm

    @property
    def key_pool(self) -> int:
        """s_k, tokens per key."""
        return self.block_size if self.k_pool_size is None else self.k_pool_size

    @property
    def keys_per_block(self) -> int:
        """m_k."""
        return self.block_size // self.key_pool

    def finer_than_release(self) -> dict[str, str]:
        """As that of a prefill gate."""
        finer = _smaller_pools(self, "k_pool_size")
        return finer | ({"query_reduction": "Qproj, Qavgproj or Qavg"} if self.has_head_queries else {})


GateConfig = PrefillGateConfig | DecodeGateConfig


def changed_settings(config: GateConfig) -> str:
    """The settings that are not the defaults, as `name=value, ...`; "" where all are.

    >>> changed_settings(PrefillGateConfig(q_pool_size=16, k_pooling=(Pool.AVG,)))
    'k_pooling=avg, q_pool_size=16'
    """
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    return ", ".join(f"{n}={'+'.join(v) if isinstance(v, tuple) else v}" for n, v in changed.items())


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


def _check_pool_size(config: Any, side: str) -> None:
    """Checks one pool size, and sets it to None where it is the block size: such a gate is of the release's kind."""
    name, field = type(config).__name__, f"{side}_pool_size"
    size, kinds = getattr(config, field), getattr(config, f"{side}_pooling")
    if size is None:
        return
    if not 1 <= size <= config.block_size or size & (size - 1):
        raise ValueError(
            f"{name}.{field} must be a power of two from 1 to the block size, {config.block_size} tokens; got {size}."
        )
    if size == 1 and len(kinds) > 1:
        raise ValueError(
            f"{name}.{field}=1 pools single tokens, which are the same under every kind of pooling, so {name}.{side}_pooling must "
            f"name one kind; got {', '.join(kinds)}. Set {name}.{side}_pooling=avg."
        )
    if size == config.block_size:
        object.__setattr__(config, field, None)


def _check_join(config: Any) -> None:
    if config.join is not Join.SUM and config.keys_per_block == 1:
        name = type(config).__name__
        raise ValueError(
            f"{name}.join={config.join} joins a block's keys, so {name}.k_pool_size must be below the block size, "
            f"{config.block_size}; got {config.key_pool}. Set {name}.k_pool_size, or leave {name}.join out."
        )


def _smaller_pools(config: Any, *names: str) -> dict[str, str]:
    return {name: f"the block size, {config.block_size}" for name in names if getattr(config, name) is not None}

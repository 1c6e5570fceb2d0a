"""Kinds of gates that come with seer-jax: what they are, and what they learn."""

import dataclasses
import enum

from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction


class GateKind(enum.StrEnum):
    """Finer gates, or those of the release."""

    FINE = "fine"
    RELEASE = "release"


@dataclasses.dataclass(frozen=True)
class GateSettings:
    """Settings of a distillation of both gates.

    Attributes:
      prefill, decode: the gates.
      target: what they learn of each block, "max" (its largest weight) or "mass".
      decode_stride: every n-th token is in the loss of the decode gate.
    """

    prefill: PrefillGateConfig
    decode: DecodeGateConfig
    target: str
    decode_stride: int


def gates_of_kind(kind: GateKind, *, block_size: int, gate_dim: int) -> GateSettings:
    """The gates of a kind.

    Args:
      kind: fine gates have pools of 16 queries and 16 keys at prefill, and a query per head and pools of 8 keys while decoding.
      block_size: b, tokens per block, 16 or more.
      gate_dim: C, channels.
    """
    prefill = PrefillGateConfig(block_size=block_size, gate_dim=gate_dim)
    decode = DecodeGateConfig(block_size=block_size, gate_dim=gate_dim)
    if kind is GateKind.RELEASE:
        return GateSettings(prefill, decode, "max", decode_stride=1)
    return GateSettings(
        dataclasses.replace(prefill, q_pool_size=16, k_pool_size=16),
        dataclasses.replace(decode, query_reduction=QueryReduction.HEADS, k_pool_size=8),
        "mass",
        decode_stride=4,
    )

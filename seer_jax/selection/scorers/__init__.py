"""What gives blocks their scores: one file each. A scorer of one's own is a class like these with `register` above it."""

from seer_jax.selection.scorers.base import SCORERS, Scorer, register
from seer_jax.selection.scorers.flexprefill import FlexPrefill
from seer_jax.selection.scorers.gate import LearnedGate
from seer_jax.selection.scorers.minference import MInference
from seer_jax.selection.scorers.oracle import MassOracle, Oracle
from seer_jax.selection.scorers.proxyattn import ProxyAttn
from seer_jax.selection.scorers.quest import Quest
from seer_jax.selection.scorers.random import Random
from seer_jax.selection.scorers.subblock import SubBlock
from seer_jax.selection.scorers.window import SinkWindow
from seer_jax.selection.scorers.xattention import XAttention

__all__ = [
    "SCORERS",
    "FlexPrefill",
    "LearnedGate",
    "MInference",
    "MassOracle",
    "Oracle",
    "ProxyAttn",
    "Quest",
    "Random",
    "Scorer",
    "SinkWindow",
    "SubBlock",
    "XAttention",
    "register",
]

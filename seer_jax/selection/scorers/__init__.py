"""What gives blocks their scores: one file each. A scorer of one's own is a class like these with `register` above it."""

from seer_jax.selection.scorers.base import SCORERS, Scorer, register
from seer_jax.selection.scorers.gate import LearnedGate
from seer_jax.selection.scorers.oracle import Oracle
from seer_jax.selection.scorers.random import Random
from seer_jax.selection.scorers.window import SinkWindow

__all__ = ["SCORERS", "LearnedGate", "Oracle", "Random", "Scorer", "SinkWindow", "register"]

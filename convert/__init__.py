"""Hugging Face checkpoints and gate checkpoints, in and out, without torch."""

from seer_jax.convert.adapters import adapted_model, load_adapter, save_adapter
from seer_jax.convert.base import load_base, save_base
from seer_jax.convert.gates import GateFormat, base_model, load_gates, recommend, recommended_policy, save_gates
from seer_jax.convert.logits import Bounds, LogitsReport, compare_logits, verify_logits
from seer_jax.convert.push import push_gates

__all__ = [
    "Bounds",
    "GateFormat",
    "LogitsReport",
    "adapted_model",
    "base_model",
    "compare_logits",
    "load_adapter",
    "load_base",
    "load_gates",
    "push_gates",
    "recommend",
    "recommended_policy",
    "save_adapter",
    "save_base",
    "save_gates",
    "verify_logits",
]

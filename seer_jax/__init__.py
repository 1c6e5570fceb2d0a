"""Learned block-sparse attention for long-context language models, in JAX."""

from seer_jax.gates.configs import DecodeGateConfig, Pool, PrefillGateConfig, QueryReduction
from seer_jax.models.config import DType, ModelConfig, RopeConfig, RopeKind
from seer_jax.gates.gate import DecodeGate, PrefillGate
from seer_jax.inference.generate import Generated, generate, plan_memory, stream
from seer_jax.inference.memory import MemoryPlan
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Gate, Oracle, Random, Scorer, SinkWindow
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.inference.prompts import pad_prompts
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.inference.text import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CumulativeMass",
    "DType",
    "DecodeGate",
    "DecodeGateConfig",
    "Dense",
    "Gate",
    "Generated",
    "Given",
    "Greedy",
    "MemoryPlan",
    "ModelConfig",
    "Oracle",
    "Policy",
    "Pool",
    "PrefillGate",
    "PrefillGateConfig",
    "QueryReduction",
    "Random",
    "RopeConfig",
    "RopeKind",
    "Sample",
    "Sampling",
    "Scorer",
    "SinkWindow",
    "Threshold",
    "TokenBudget",
    "Tokenizer",
    "TopK",
    "Transformer",
    "__version__",
    "from_pretrained",
    "generate",
    "load_tokenizer",
    "pad_prompts",
    "plan_memory",
    "stream",
]

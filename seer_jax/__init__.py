"""Learned block-sparse attention for long-context language models, in JAX."""

from seer_jax.config import (
    DecodeGateConfig,
    DType,
    ModelConfig,
    Pool,
    PrefillGateConfig,
    QueryReduction,
    RopeConfig,
    RopeKind,
)
from seer_jax.gate import DecodeGate, PrefillGate
from seer_jax.generate import Generated, generate, plan_memory, stream
from seer_jax.memory import MemoryPlan
from seer_jax.model import Transformer
from seer_jax.policies import (
    CumulativeMass,
    Dense,
    Gate,
    Given,
    Oracle,
    Policy,
    Random,
    Scorer,
    SinkWindow,
    Threshold,
    TokenBudget,
    TopK,
)
from seer_jax.pretrained import from_pretrained, load_tokenizer
from seer_jax.prompts import pad_prompts
from seer_jax.sampling import Greedy, Sample, Sampling
from seer_jax.text import Tokenizer

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

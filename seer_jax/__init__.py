"""Learned block-sparse attention for long-context language models, in JAX."""

import ast
import functools
import importlib
import pathlib
import typing

if typing.TYPE_CHECKING:  # imported when they are first used, see `__getattr__`
    from seer_jax.gates.configs import DecodeGateConfig, Pool, PrefillGateConfig, QueryReduction
    from seer_jax.gates.decode import DecodeGate
    from seer_jax.gates.prefill import PrefillGate
    from seer_jax.inference.conversation import Conversation
    from seer_jax.inference.conversation.shared_prefix import Continued, generate_each
    from seer_jax.inference.engine import Engine
    from seer_jax.inference.generate import Generated, generate, plan_memory, stream
    from seer_jax.inference.memory import MemoryPlan
    from seer_jax.inference.prompts import pad_prompts
    from seer_jax.inference.request import Request
    from seer_jax.inference.sampling import Greedy, Sample, Sampling
    from seer_jax.inference.text import Tokenizer
    from seer_jax.models.config import DType, ModelConfig, RopeConfig, RopeKind
    from seer_jax.models.decoder import Transformer
    from seer_jax.models.pretrained import from_pretrained, load_generation_settings, load_tokenizer
    from seer_jax.selection.notation import parse_policy
    from seer_jax.selection.policies import Dense, Given, Policy
    from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
    from seer_jax.selection.scorers import (
        FlexPrefill,
        LearnedGate,
        MassOracle,
        MInference,
        Oracle,
        ProxyAttn,
        Quest,
        Random,
        Scorer,
        SinkWindow,
        SubBlock,
        XAttention,
    )

__version__ = "0.1.0"

# In a checkout, train/ and convert/ lie beside this folder: found there, two checkouts never mix, whichever one is installed.
_CHECKOUT = pathlib.Path(__file__).parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "train" / "__init__.py").is_file():
    __path__.append(str(_CHECKOUT))

__all__ = [
    "Continued",
    "Conversation",
    "CumulativeMass",
    "DType",
    "DecodeGate",
    "DecodeGateConfig",
    "Dense",
    "Engine",
    "FlexPrefill",
    "Generated",
    "Given",
    "Greedy",
    "LearnedGate",
    "MInference",
    "MassOracle",
    "MemoryPlan",
    "ModelConfig",
    "Oracle",
    "Policy",
    "Pool",
    "PrefillGate",
    "PrefillGateConfig",
    "ProxyAttn",
    "QueryReduction",
    "Quest",
    "Random",
    "Request",
    "RopeConfig",
    "RopeKind",
    "Sample",
    "Sampling",
    "Scorer",
    "SinkWindow",
    "SubBlock",
    "Threshold",
    "TokenBudget",
    "Tokenizer",
    "TopK",
    "Transformer",
    "XAttention",
    "__version__",
    "from_pretrained",
    "generate",
    "generate_each",
    "load_generation_settings",
    "load_tokenizer",
    "pad_prompts",
    "parse_policy",
    "plan_memory",
    "stream",
]


def __getattr__(name: str) -> typing.Any:
    """A public name, or a module of the package, imported now: what needs neither JAX nor a model does not wait for them."""
    if name in (homes := _homes()):
        return getattr(importlib.import_module(homes[name]), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # a module that this one needs is not installed
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@functools.cache
def _homes() -> dict[str, str]:
    """The module of each public name, as the imports above say it to type checkers."""
    found = {}
    for node in ast.walk(ast.parse(pathlib.Path(__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.name: node.module for alias in node.names}
    return found

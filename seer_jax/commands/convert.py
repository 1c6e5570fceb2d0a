"""What `seer-jax convert` and `seer-jax verify` do."""

import dataclasses
import os
import shutil
from pathlib import Path

from seer_jax.convert.base import BASE_PATTERNS, load_base
from seer_jax.convert.gate_config import policy_from_hf
from seer_jax.convert.gates import GATE_PATTERNS, GateFormat, load_gates, save_gates
from seer_jax.convert.logits import Bounds, LogitsReport, verify_logits
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.models.config import DType
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import read_config, resolve, resolve_gate

_MODEL_PATTERNS = (*BASE_PATTERNS, *TOKENIZER_PATTERNS, "generation_config.json")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Writes gates in another format, alone or together with their base model.

    Attributes:
      gates: folder or hub id of the gates.
      output: folder to write; it must not be the one that is read.
      format: of the weight file; pth is what the PyTorch release reads.
      base: folder or hub id of the base model, which the gates are then checked against. None: the gates' own config.json.
      include_base: also copy the base model's weights, configuration and tokenizer, so that the one folder serves as base and
        as gates.
      dtype: of the gates in the file; float32 keeps them exactly.
    """

    gates: str
    output: Path
    format: GateFormat = GateFormat.SAFETENSORS
    base: str | None = None
    include_base: bool = False
    dtype: DType = DType.FLOAT32

    def __post_init__(self) -> None:
        if self.include_base and self.base is None:
            raise ValueError("include_base copies a base model, so it needs base; got None. Give its folder or hub id.")


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Compares the dense logits of a model with a reference.

    Attributes:
      base: folder or hub id of the base model.
      reference: safetensors file with input_ids [B, T], positions [N] and logits [B, N, V].
      dtype: to load and compute in; float32 for an exact comparison. bfloat16 keeps only within wider bounds, about 3e-2
        (relative error) and 1e-2 (KL).
      bounds: beyond which the comparison fails.
    """

    base: str
    reference: Path
    dtype: DType = DType.FLOAT32
    bounds: Bounds = dataclasses.field(default_factory=Bounds)


def convert(config: ConvertConfig) -> Path:
    """Does what `ConvertConfig` says; returns the weight file of the gates.

    Raises:
      ValueError: the gates do not fit the base model, or output is a folder that is read.
      OSError: something is not there; see `load_gates`.
    """
    source = resolve_gate(config.gates, GATE_PATTERNS)
    hf = read_config(source)
    policy, base_model = policy_from_hf(hf), hf.get("base_model", "")
    base = None
    if config.base is not None:
        base = resolve(config.base, _MODEL_PATTERNS if config.include_base else ("config.json",))
        hf, base_model = read_config(base), config.base
    for folder in (source, base):
        if folder is not None and config.output.resolve() == folder.resolve():
            raise ValueError(f"output must be a folder of its own; got {config.output}, which is read.")
    gate = load_gates(source, config_from_hf(hf))
    if base is not None and config.include_base:
        _copy(base, config.output)
    return save_gates(
        gate,
        config.output,
        base_model=base_model,
        hf_config=hf,
        format=config.format,
        policy=policy,
        dtype=config.dtype,
    )


def verify(config: VerifyConfig) -> LogitsReport:
    """Does what `VerifyConfig` says; print the report, and look at its `passed`."""
    model = load_base(config.base, dtype=config.dtype)
    return verify_logits(model, config.reference, config.bounds)


def _copy(base: Path, output: Path) -> None:
    """Copies model and tokenizer; files that the hub's cache links to are copied as files."""
    output.mkdir(parents=True, exist_ok=True)
    names = {path.name for pattern in _MODEL_PATTERNS for path in base.glob(pattern)}
    for name in sorted(names):
        shutil.copyfile(os.path.realpath(base / name), output / name)

"""Write gates in another format, alone or with their base model."""

import dataclasses
import os
import shutil
from pathlib import Path

from seer_jax.commands.arguments import ExitCode, parse
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gates import GATE_PATTERNS, GateFormat, load_gates, save_gates
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
      output: folder to write; it must differ from the folders that are read.
      format: format of the weight file; the PyTorch release reads pth.
      base: folder or hub id of the base model, against which the gates are checked. None: the gates' own config.json.
      include_base: also copy the base model's weights, configuration and tokenizer, so that one folder serves as base and
        as gates.
      dtype: dtype of the gates in the file; float32 keeps them exactly.
    """

    gates: str
    output: Path
    format: GateFormat = GateFormat.SAFETENSORS
    base: str | None = None
    include_base: bool = False
    dtype: DType = DType.FLOAT32

    def __post_init__(self) -> None:
        if self.include_base and self.base is None:
            raise ValueError(
                "include_base must come with base, the model to copy; got None. Give its folder or hub id."
            )


def run(words: list[str]) -> int:
    print(convert(parse(ConvertConfig, "convert", words)))
    return ExitCode.OK


def convert(config: ConvertConfig) -> Path:
    """Runs the conversion and returns the weight file of the gates.

    Raises:
      ValueError: the gates do not fit the base model, or output is a folder that is read.
      OSError: gates or base are not there; see `load_gates`.
    """
    source = resolve_gate(config.gates, GATE_PATTERNS)
    hf = read_config(source)
    base, base_model = None, hf.get("base_model", "")
    if config.base is not None:
        base = resolve(config.base, _MODEL_PATTERNS if config.include_base else ("config.json",))
        hf, base_model = read_config(base), config.base
    for folder in (source, base):
        if folder is not None and config.output.resolve() == folder.resolve():
            raise ValueError(
                f"output must differ from the folders that are read; got {config.output}. Choose another folder."
            )
    gate = load_gates(source, config_from_hf(hf))
    if base is not None and config.include_base:
        _copy(base, config.output)
    return save_gates(
        gate,
        config.output,
        base_model=base_model,
        hf_config=hf,
        format=config.format,
        dtype=config.dtype,
    )


def _copy(base: Path, output: Path) -> None:
    """Copies model and tokenizer; links into the hub's cache are copied as files."""
    output.mkdir(parents=True, exist_ok=True)
    names = {path.name for pattern in _MODEL_PATTERNS for path in base.glob(pattern)}
    for name in sorted(names):
        shutil.copyfile(os.path.realpath(base / name), output / name)

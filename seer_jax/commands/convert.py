"""Write gates in another format, alone or with their base model, or a base model as a Hugging Face folder."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from seer_jax.commands import ExitCode
from seer_jax.commands.arguments import AdapterOptions, HubOptions, parse
from seer_jax.convert import load_adapter, push_gates
from seer_jax.convert.base import BASE_PATTERNS, TEXT_PATTERNS, load_base, save_base
from seer_jax.convert.gate_config import CALIBRATION_KEY, TRAINING_KEY
from seer_jax.convert.gates import GATE_PATTERNS, GateFormat, load_gates, save_gates
from seer_jax.folders import check_is_base, check_is_gate
from seer_jax.gguf.header import is_gguf
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.models.config import DType
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import is_hub_id, read_config, resolve, resolve_gate
from seer_jax.outputs import check_output_folder

_MODEL_PATTERNS = (*BASE_PATTERNS, *TEXT_PATTERNS)
_WRITTEN = (*BASE_PATTERNS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_SAME = "output must differ from the folders that are read; got {}. Choose another folder."


@dataclasses.dataclass(frozen=True)
class ConvertConfig(HubOptions, AdapterOptions):
    """Writes gates in another format, alone or together with their base model; without gates, a base model as a Hugging Face folder, an
    adapter merged into it.

    Attributes:
      gates: folder or hub id of a gate. None: the model alone is written, with its tokenizer, for example from a GGUF file.
      output: folder to write; it must differ from the folders that are read.
      format: format of the weight file; the PyTorch release reads pth.
      model: folder, GGUF file or hub id of the base model, against which the gates are checked. None: with include_base the
        one that the gates name, otherwise the gates' own config.json.
      include_base: also copy the base model's weights, configuration and tokenizer, so that one folder serves as base and
        as gates.
      dtype: dtype of the weights in the file. None: float32 for gates, which keeps them exactly, and bfloat16 for a model.
      force: overwrite gates and models that the output folder has.
      push_to_hub: repository owner/name to upload the written gates to, with a model card; the token is that of `hf auth login` or
        HF_TOKEN. None: they stay here.
    """

    output: Path
    gates: str | None = None
    format: GateFormat = GateFormat.SAFETENSORS
    model: str | None = None
    include_base: bool = False
    dtype: DType | None = None
    force: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for place in filter(None, (self.gates, self.model)):
            if Path(place).expanduser().resolve() == self.output.expanduser().resolve():
                raise ValueError(_SAME.format(self.output))
        if self.gates is None:
            self._check_model_alone()
        elif self.adapter is not None:
            raise ValueError(
                f"adapter must come without `gates`, as it is merged into a model that is written alone; got {self.adapter}. Leave one out."
            )
        if self.model is None and self.revision is not None and not self.include_base:
            raise ValueError(
                f"revision must come with the `model` that it is of; got {self.revision!r} alone. Leave it out."
            )
        if self.push_to_hub is not None and not is_hub_id(self.push_to_hub):
            raise ValueError(f"push_to_hub must name a repository, owner/name; got {self.push_to_hub!r}.")

    def _check_model_alone(self) -> None:
        if self.model is None:
            raise ValueError("`gates` or `model` must be given; got neither. Name what is to be written.")
        defaults = dict(format=GateFormat.SAFETENSORS, include_base=False, push_to_hub=None)
        for name, default in defaults.items():
            if (got := getattr(self, name)) != default:
                raise ValueError(f"{name} must come with `gates`; got {got} for a model alone. Leave it out.")


def run(words: list[str]) -> int:
    config = parse(ConvertConfig, "convert", words, aliases={"--base": "--model"})
    print(convert(config))
    if config.push_to_hub is not None:
        print(push_gates(config.output, config.push_to_hub))
    return ExitCode.OK


def convert(config: ConvertConfig) -> Path:
    """Runs the conversion and returns the weight file of the gates, or the folder of a model that is written alone.

    Raises:
      ValueError: the gates do not fit the base model, or output is a folder that is read.
      OSError: gates or base are not there; see `load_gates`.
    """
    if config.gates is None:
        return _convert_model(config)
    source = resolve_gate(config.gates, GATE_PATTERNS, cache_dir=config.cache_dir)
    check_is_gate(source)
    told = hf = read_config(source)
    base, base_model = None, hf.get("base_model") or ""
    name = config.model or (base_model if config.include_base else None)
    if config.include_base and not name:
        raise ValueError("include_base must come with the model to copy, and the gates name none. Give model=...")
    if name:
        base = resolve(name, _MODEL_PATTERNS if config.include_base else ("config.json",), **config.hub)
        check_is_base(base)
        hf, base_model = read_config(base), name
        if config.include_base and is_gguf(base):
            raise ValueError(
                f"include_base must copy a Hugging Face folder; got the file {name!r}. Write one first: seer-jax convert --model {name} "
                "--output FOLDER, and give it as model."
            )
    copied = _files(base) if base is not None and config.include_base else []
    names = [*GATE_PATTERNS, *(path.name for path in copied)]
    _check_output(config, [folder for folder in (source, base) if folder is not None], names)
    gate = load_gates(source, config_from_hf(hf))
    return save_gates(
        gate,
        config.output,
        base_model=base_model,
        hf_config=hf,
        format=config.format,
        dtype=config.dtype or DType.FLOAT32,
        training=_object(told.get(TRAINING_KEY)),
        calibration=_object(told.get(CALIBRATION_KEY)),
        copies=copied,
        force=config.force,
    )


def _object(told: Any) -> dict[str, Any] | None:
    """What a file says for people, where it is a JSON object."""
    return told if isinstance(told, dict) else None


def _convert_model(config: ConvertConfig) -> Path:
    """Writes a base model with its tokenizer. The weights pass through the memory of the host."""
    assert config.model is not None  # as the configuration says
    base = resolve(config.model, _MODEL_PATTERNS, **config.hub)
    check_is_base(base, with_gates=False)
    _check_output(config, [base], _WRITTEN)
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    model = load_base(base, dtype=config.dtype or DType.BFLOAT16, sharding=lambda path, array: host)
    has_text = is_gguf(base) or any(next(base.glob(pattern), None) for pattern in TOKENIZER_PATTERNS)
    hf = read_config(base)
    if config.adapter is not None:
        from seer_jax.train.finetuning import describe

        model = load_adapter(config.adapter, model, base=config.model, cache_dir=config.cache_dir)
        hf = describe(model.config, hf)
    save_base(model, config.output, hf_config=hf, tokenizer=base if has_text else None)
    return config.output


def _check_output(config: ConvertConfig, read: list[Path], written: Iterable[str]) -> None:
    """Refuses to write where something is read, or where gates or a model are that the user may want to keep."""
    output = config.output
    if any(output.resolve() == folder.resolve() for folder in read):
        raise ValueError(_SAME.format(output))
    check_output_folder(output)
    there = list(dict.fromkeys(path.name for name in written for path in sorted(output.glob(name))))
    if there and not config.force:
        raise FileExistsError(
            f"output must not hold what is to be written; {output} has {', '.join(there)}. Choose another folder, or overwrite "
            "them with force=True."
        )


def _files(base: Path) -> list[Path]:
    """Files of a model and its tokenizer."""
    return sorted({path for pattern in _MODEL_PATTERNS for path in base.glob(pattern)})

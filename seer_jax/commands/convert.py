"""Write gates in another format, alone or with their base model."""

import dataclasses
from pathlib import Path

from seer_jax.commands.arguments import ExitCode, HubOptions, parse
from seer_jax.convert import push_gates
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gates import GATE_PATTERNS, GateFormat, load_gates, save_gates
from seer_jax.folders import check_is_base, check_is_gate
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.models.config import DType
from seer_jax.models.families import config_from_hf
from seer_jax.models.hub import is_hub_id, read_config, resolve, resolve_gate
from seer_jax.outputs import check_output_folder

_MODEL_PATTERNS = (*BASE_PATTERNS, *TOKENIZER_PATTERNS, "generation_config.json")
_SAME = "output must differ from the folders that are read; got {}. Choose another folder."


@dataclasses.dataclass(frozen=True)
class ConvertConfig(HubOptions):
    """Writes gates in another format, alone or together with their base model.

    Attributes:
      gates: folder or hub id of the gates.
      output: folder to write; it must differ from the folders that are read.
      format: format of the weight file; the PyTorch release reads pth.
      model: folder or hub id of the base model, against which the gates are checked. None: with include_base the
        one that the gates name, otherwise the gates' own config.json.
      include_base: also copy the base model's weights, configuration and tokenizer, so that one folder serves as base and
        as gates.
      dtype: dtype of the gates in the file; float32 keeps them exactly.
      force: overwrite gates and models that the output folder has.
      push_to_hub: repository owner/name to upload the written gates to, with a model card; the token is that of `hf auth login` or
        HF_TOKEN. None: they stay here.
    """

    gates: str
    output: Path
    format: GateFormat = GateFormat.SAFETENSORS
    model: str | None = None
    include_base: bool = False
    dtype: DType = DType.FLOAT32
    force: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for place in filter(None, (self.gates, self.model)):
            if Path(place).expanduser().resolve() == self.output.expanduser().resolve():
                raise ValueError(_SAME.format(self.output))
        if self.model is None and self.revision is not None and not self.include_base:
            raise ValueError(
                f"revision must come with the `model` that it is of; got {self.revision!r} alone. Leave it out."
            )
        if self.push_to_hub is not None and not is_hub_id(self.push_to_hub):
            raise ValueError(f"push_to_hub must name a repository, owner/name; got {self.push_to_hub!r}.")


def run(words: list[str]) -> int:
    config = parse(ConvertConfig, "convert", words, aliases={"--base": "--model"})
    print(convert(config))
    if config.push_to_hub is not None:
        print(push_gates(config.output, config.push_to_hub))
    return ExitCode.OK


def convert(config: ConvertConfig) -> Path:
    """Runs the conversion and returns the weight file of the gates.

    Raises:
      ValueError: the gates do not fit the base model, or output is a folder that is read.
      OSError: gates or base are not there; see `load_gates`.
    """
    source = resolve_gate(config.gates, GATE_PATTERNS, cache_dir=config.cache_dir)
    check_is_gate(source)
    hf = read_config(source)
    base, base_model = None, hf.get("base_model") or ""
    name = config.model or (base_model if config.include_base else None)
    if config.include_base and not name:
        raise ValueError("include_base must come with the model to copy, and the gates name none. Give model=...")
    if name:
        base = resolve(name, _MODEL_PATTERNS if config.include_base else ("config.json",), **config.hub)
        check_is_base(base)
        hf, base_model = read_config(base), name
    copied = _files(base) if base is not None and config.include_base else []
    _check_output(config, [folder for folder in (source, base) if folder is not None], [path.name for path in copied])
    gate = load_gates(source, config_from_hf(hf))
    return save_gates(
        gate,
        config.output,
        base_model=base_model,
        hf_config=hf,
        format=config.format,
        dtype=config.dtype,
        copies=copied,
        force=config.force,
    )


def _check_output(config: ConvertConfig, read: list[Path], copied: list[str]) -> None:
    """Refuses to write where something is read, or where gates or a model are that the user may want to keep."""
    output = config.output
    if any(output.resolve() == folder.resolve() for folder in read):
        raise ValueError(_SAME.format(output))
    check_output_folder(output)
    there = [name for name in dict.fromkeys((*GATE_PATTERNS, *copied)) if (output / name).exists()]
    if there and not config.force:
        raise FileExistsError(
            f"output must not hold what is to be written; {output} has {', '.join(there)}. Choose another folder, or overwrite "
            "them with force=True."
        )


def _files(base: Path) -> list[Path]:
    """Files of a model and its tokenizer."""
    return sorted({path for pattern in _MODEL_PATTERNS for path in base.glob(pattern)})

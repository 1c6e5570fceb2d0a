"""What fine-tuning trains and writes: the adapter and the RoPE of a model, and the folders of the result."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from seer_jax.convert import load_adapter, load_gates, save_adapter, save_base, save_gates
from seer_jax.convert.base import tokenizer_folder
from seer_jax.convert.gates import GATE_PATTERNS
from seer_jax.folders import ADAPTER_FOLDER, MODEL_FOLDER
from seer_jax.gates.prefill import PrefillGate
from seer_jax.lora import LoraConfig, adapted, add_lora, lora_config
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import config_from_hf, config_to_hf
from seer_jax.models.hub import resolve_gates
from seer_jax.models.pretrained import from_pretrained
from seer_jax.models.rope import same_rope
from seer_jax.selection.rules import TopK
from seer_jax.sharding.processes import is_first
from seer_jax.train.config import FinetuneConfig, TargetStatistic
from seer_jax.train.data.packing import PackedDataset, Packing
from seer_jax.train.joint import GATE


def check(config: FinetuneConfig, *, reads_text: bool) -> None:
    """Raises ValueError where settings of a gate that is trained along are given, and no gate; or where the text would be packed for
    nothing."""
    if config.initial_gates:
        if reads_text and config.data.packing is not Packing.CONCATENATE:
            raise several_sequences(f"data.packing={config.data.packing}")
        return
    usual = FinetuneConfig()
    names = ("target", "density", "gate_loss_weight", "gate_learning_rate")
    given = {name: value for name in names if (value := getattr(config, name)) != getattr(usual, name)}
    if given:
        listed, values = ", ".join(f"`{name}`" for name in given), ", ".join(map(str, given.values()))
        raise ValueError(
            f"{listed} must come with the prefill gate that is trained along, for attention is dense without one; got {values} and no "
            "initial_gates. Name a gate, or leave them out."
        )


def several_sequences(got: str) -> ValueError:
    """The error of a gate that is to be trained along on rows which may hold several sequences."""
    return ValueError(
        f"Fine-tuning with a gate must have rows of one sequence each; got {got}. Set data.packing={Packing.CONCATENATE.value}."
    )


def is_packed(rows: PackedDataset) -> bool:
    """Whether a row may hold several sequences or padding."""
    return bool((rows.lengths != rows.row_length).any()) or len(rows.lengths) != len(rows)


def tokenizer_of(name: str) -> str | None:
    """The model whose tokenizer goes with the trained one; None where it has none, and rows of tokens are given."""
    try:
        tokenizer_folder(name)
    except FileNotFoundError:
        return None
    return name


def untrained(config: FinetuneConfig, model: Transformer | None) -> Transformer:
    """A model with random weights, of the configuration of a given model, or of the one that the settings name."""
    shapes = from_pretrained(config.model, dtype=config.dtype, abstract=True) if model is None else model
    return Transformer(shapes.config, dtype=shapes.dtype, rngs=nnx.Rngs(config.seed))


def prepare(config: FinetuneConfig, model: Transformer) -> FinetuneConfig:
    """Gives the model its adapter, its gate and its RoPE: the gate is of the model with its adapter, before YaRN.

    Returns:
      The settings, with the target of the gate.
    """
    target = config.target
    if config.initial_adapter is not None:
        load_adapter(config.initial_adapter, model, base=config.model or None)
    _check_lora(config, model)
    if config.initial_gates:
        target = _attach_gate(config, model)
    if config.yarn_factor is not None:
        model.use_rope(model.config.with_yarn(config.yarn_factor))
    if config.lora.rank and not adapted(model):
        add_lora(model, config.lora, seed=config.seed)
    return dataclasses.replace(config, target=target or TargetStatistic.MAX)


def _check_lora(config: FinetuneConfig, model: Transformer) -> None:
    """Raises ValueError where the settings of adapters are not those of the adapter that the model carries, or come without a rank."""
    found = lora_config(model)
    if config.lora in (found, LoraConfig()):
        return
    if found is not None:
        given, own = dataclasses.asdict(config.lora), dataclasses.asdict(found)
        names = [name for name in own if given[name] != own[name]]
        raise ValueError(
            "The settings of an adapter that is trained further must be its own: "
            f"{', '.join(f'lora.{name}={_typed(own[name])}' for name in names)}; got "
            f"{', '.join(_typed(given[name]) for name in names)}. Set them so."
        )
    if not config.lora.rank:
        raise ValueError(
            "lora.rank must be at least 1 where other settings of an adapter are given; got 0, with which all weights train. Set lora.rank=16, or "
            "leave out lora.alpha and lora.targets."
        )


def _typed(value: Any) -> str:
    """A value as it is typed after an option."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _attach_gate(config: FinetuneConfig, model: Transformer) -> TargetStatistic:
    """Gives the model the gate that is trained along; returns its target."""
    found = {place: load_gates(place, model.config) for place in resolve_gates(config.initial_gates, GATE_PATTERNS)}
    gates = {place: gate for place, gate in found.items() if isinstance(gate, PrefillGate)}
    if len(gates) != 1:
        got = f"the prefill gates {' and '.join(map(str, gates))}" if gates else "a decode gate"
        remedy = "Name one of them" if gates else "Distil one first: seer-jax train"
        raise ValueError(f"initial_gates of fine-tuning must hold one prefill gate; got {got}. {remedy}.")
    (gate,) = gates.values()
    length, block = config.sequence_length, gate.config.block_size
    if length % block or length < 2 * block:  # of one block there is nothing to choose
        raise ValueError(
            f"sequence_length must be a multiple of the gate's block size {block} and at least two blocks; got {length}. Set "
            f"sequence_length={max(2, length // block) * block}, for example."
        )
    before = gate.distilled_on
    if config.from_scratch:
        gate = PrefillGate(gate.config, model.config, rngs=nnx.Rngs(config.seed))
    # What it was calibrated for is past; this is what the model learns under.
    gate.recommended = TopK(config.density)
    target = TargetStatistic(config.target or before or TargetStatistic.MAX)
    gate.distilled_on = target.value
    model.attach(gate if model.layout is None else model.layout.placed(gate))
    return target


def folders(config: FinetuneConfig) -> tuple[Path, ...]:
    """Folders of the model and of the adapter that a run writes."""
    return () if config.output is None else (Path(config.output) / MODEL_FOLDER, Path(config.output) / ADAPTER_FOLDER)


def gate_folders(config: FinetuneConfig) -> tuple[Path, ...]:
    """The folder of the gate that is trained along; none where there is none."""
    return () if config.output is None or not config.initial_gates else (Path(config.output) / GATE,)


def describe(config: ModelConfig, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a trained model: that of its base, {} where that has none, with the RoPE that the model has now.

    Raises:
      ValueError: no `config.json` can describe the model.
    """
    made = config_to_hf(config)
    if not hf or same_rope(config_from_hf(hf).rope, config.rope, config.head_dim):
        return dict(hf or made)
    kept = {key: x for key, x in hf.items() if key not in ("rope_parameters", "original_max_position_embeddings")}
    return kept | {key: made[key] for key in ("rope_theta", "rope_scaling", "max_position_embeddings")}


def write(
    config: FinetuneConfig, hf: Mapping[str, Any] | None, tokenizer: str | None, model: Transformer, step: int
) -> None:
    """Writes the adapter, and the merged model at the end of the run or where one is there; without an adapter the model."""
    saved, adapter = folders(config)
    adapts = bool(adapted(model))
    if adapts:
        save_adapter(model, adapter, base_model=config.model)
    # The model of a run that had ended before it got more steps must not stay behind its adapter and gate.
    if not adapts or step >= config.steps or saved.is_dir():
        save_base(model, saved, hf_config=hf, tokenizer=tokenizer)
    for folder in gate_folders(config):
        _write_gate(config, model, folder, saved, step)


def _write_gate(config: FinetuneConfig, model: Transformer, folder: Path, base: Path, step: int) -> None:
    """Writes the gate that is trained along, for the model that is written beside it."""
    gate: Any = model.prefill_gate
    if model.layout is not None:
        gate = model.layout.everywhere(gate)
    if is_first():
        training = {"step": step, "steps": config.steps, "finished": step >= config.steps, "target": config.target}
        save_gates(gate, folder, base_model=base, training=training)

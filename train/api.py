"""Training in one call: `distill` and `finetune`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from seer_jax.convert import save_gates
from seer_jax.gates.configs import GateConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import config_to_hf
from seer_jax.models.hub import read_config, resolve
from seer_jax.train.config import DistillConfig, FinetuneConfig, TrainConfig, to_dict
from seer_jax.train.data.batches import load_dataset
from seer_jax.train.data.packing import PackedDataset
from seer_jax.train.data.tokens import check_tokens
from seer_jax.train.loop.run import ProgressFunction, TrainResult, run, run_folder
from seer_jax.train.tasks import Distillation, LanguageModelling


def distill(
    config: DistillConfig,
    *,
    model: Transformer | None = None,
    dataset: PackedDataset | np.ndarray | None = None,
    progress: ProgressFunction | None = None,
) -> TrainResult:
    """Distils gates that predict which blocks the frozen model attends to (SeerAttention, arXiv 2410.13276; -R, arXiv 2506.08889).

    With an output folder the run can be stopped or killed at any moment; the same call resumes from the newest checkpoint and makes
    the same steps as an undisturbed run. The trained gates are written to `prefill_gate` and `decode_gate` in that folder, for
    `from_pretrained` and `load_gates`.

    Args:
      config: the run.
      model: the base model; None: it is read from `config.model`. It is not changed. A gate that it carries is trained further, a
        missing one is made by `config`.
      dataset: rows of tokens, or an array Int [N, T] of them; None: read as `config.data` says.
      progress: called after each step; None: a bar or plain lines are shown.

    Returns:
      The model with its gates, and where they were written.

    Raises:
      ValueError: settings, model, data and checkpoints do not fit each other.
      FloatingPointError: the loss is no longer finite.
      KeyboardInterrupt, SystemExit: the process was asked to stop (SIGINT, SIGTERM), and has written a checkpoint.
    """
    given, model = model, _load_model(config, model)
    hf_config = None
    if (
        config.output is not None
    ):  # made before training, so that a model which config.json cannot describe is refused now
        hf_config = (
            config_to_hf(given.config) if given is not None else read_config(resolve(config.model, ("config.json",)))
        )
    gates = _attach_gates(config, model)
    dataset = _load_dataset(config, model, dataset, gates[0].block_size)
    task, trained, frozen = Distillation.start(model, config)
    settings = {"model": to_dict(model.config), "gates": [to_dict(gate) for gate in gates]}
    result = run(task, trained, frozen, dataset, config, settings, progress=progress)
    folder = run_folder(config)
    return (
        result if folder is None else dataclasses.replace(result, gates=_save_gates(config, result, folder, hf_config))
    )


def _save_gates(
    config: DistillConfig, result: TrainResult, folder: Path, hf_config: Mapping[str, Any] | None
) -> tuple[Path, ...]:
    """Writes each trained gate to a folder of its own; returns the folders."""
    names = config.gates.attributes
    for name in names:
        save_gates(getattr(result.model, name), folder / name, base_model=config.model, hf_config=hf_config)
    return tuple(folder / name for name in names)


def finetune(
    config: FinetuneConfig,
    *,
    model: Transformer | None = None,
    dataset: PackedDataset | np.ndarray | None = None,
    progress: ProgressFunction | None = None,
) -> TrainResult:
    """Trains all base weights by the language-model loss; gates of the model stay as they are.

    Takes and raises what `distill` does, and returns the model; `seer_jax.convert.save_base` writes it. Weights and moments are
    float32, so that a weight takes 16 bytes with its gradient; the arithmetic is of the model's dtype. Only the hidden states between
    layers are kept for the backward pass, which computes the layers again.
    """
    model = _load_model(config, model)
    dataset = _load_dataset(config, model, dataset, block_size=config.block_size)
    packed = bool((dataset.lengths != dataset.row_length).any()) or len(dataset.lengths) != len(dataset)
    task, trained, frozen = LanguageModelling.start(model, packed=packed)
    settings = {"model": to_dict(model.config)}
    del model  # its weights are not needed beside their float32 copies
    return run(task, trained, frozen, dataset, config, settings, progress=progress)


def _load_model(config: TrainConfig, model: Transformer | None) -> Transformer:
    """The model to start from; a given one is not changed, though its arrays are shared."""
    if model is not None:
        return nnx.merge(*nnx.split(model))
    if not config.model:
        raise ValueError("Training needs a base model; got model=''. Set `model` to a folder or hub id.")
    from seer_jax.models.pretrained import from_pretrained

    return from_pretrained(config.model, dtype=config.precision)


def _attach_gates(config: DistillConfig, model: Transformer) -> list[GateConfig]:
    """Gives the model the gates that it lacks; returns the configurations of those that train."""
    rngs = nnx.Rngs(config.seed)
    names = config.gates.attributes
    for name in names:
        if getattr(model, name) is None:
            model.add_gate(getattr(config, name.removesuffix("_gate")), rngs=rngs)
    gates = [getattr(model, name).config for name in names]
    sizes = sorted({gate.block_size for gate in gates})
    if len(sizes) > 1 or config.sequence_length % sizes[0]:
        raise ValueError(
            "The gates must have one block size, and it must divide sequence_length; "
            f"got block sizes {sizes} and sequence_length={config.sequence_length}."
        )
    return gates


def _load_dataset(
    config: TrainConfig, model: Transformer, dataset: PackedDataset | np.ndarray | None, block_size: int
) -> PackedDataset:
    length, context = config.sequence_length, model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"sequence_length must be at most the model's context of {context} tokens; got {length}. Lower it, or take a model "
            "whose RoPE is scaled for longer sequences."
        )
    vocab_size = model.config.vocab_size
    if dataset is None:
        folder = run_folder(config)
        return load_dataset(
            config.data,
            model=config.model,
            vocab_size=vocab_size,
            row_length=length,
            block_size=block_size,
            cache=folder and folder / "tokens",
        )
    if not isinstance(dataset, PackedDataset):
        dataset = PackedDataset.from_rows(dataset)
    check_tokens(dataset.tokens, vocab_size)
    if dataset.row_length != length or (len(dataset.lengths) > len(dataset) and dataset.block_size % block_size):
        raise ValueError(
            f"The rows of a dataset must have sequence_length={length} tokens, with sequences at multiples of {block_size}; "
            f"got rows of {dataset.row_length} and multiples of {dataset.block_size}. Pack it for this run."
        )
    return dataset

"""Training in one call: `distill` and `finetune`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from seer_jax.convert import load_gates, save_gates
from seer_jax.convert.gates import GATE_PATTERNS
from seer_jax.gates.configs import GateConfig, PrefillGateConfig
from seer_jax.models.decoder import Transformer, check_model
from seer_jax.models.families import config_to_hf
from seer_jax.models.hub import read_config, resolve, resolve_gates
from seer_jax.train.config import DistillConfig, FinetuneConfig, TrainConfig, absolute, to_dict
from seer_jax.train.data.batches import hold_out, load_dataset
from seer_jax.train.data.packing import PackedDataset
from seer_jax.train.data.sources import check_sources
from seer_jax.train.data.store import check_tokens
from seer_jax.train.loop.run import TrainResult, run
from seer_jax.train.loop.session import ProgressFunction, Session, open_session
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
    the same steps as an undisturbed run. With more or fewer `steps` than before it goes on too: from there on the learning rate is that
    of a run of the new length, and the rows of data stay the same. At each checkpoint, and when the run is stopped, the gates are written
    to `prefill_gate` and `decode_gate` in that folder, for `from_pretrained` and `load_gates`; `seer_jax_training` in their
    `config.json` says how far they are trained, and on which target.

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
      FileExistsError: the output folder has gates, but no checkpoints of the run that made them.
      BlockingIOError: another run is using the output folder.
      OSError: the output folder takes no more files, mostly as the disk is full; the error says what is kept.
      MemoryError: the device has no memory for the run.
      FloatingPointError: the loss is no longer finite.
      KeyboardInterrupt, SystemExit: the process was asked to stop (SIGINT, SIGTERM), and has written a checkpoint.
    """
    _check_config(config, DistillConfig)
    config = absolute(config)
    _check_model(config, model)
    _check_text(config, dataset)
    with open_session(config, progress) as session:
        given, model = model, _load_model(config, model, session)
        hf_config = None
        if (
            config.output is not None
        ):  # made before training, so that a model which config.json cannot describe is refused now
            described = given is None
            hf_config = (
                read_config(resolve(config.model, ("config.json",))) if described else config_to_hf(model.config)
            )
        _check_context(config, model)
        gates = _attach_gates(config, model)
        settings = {"model": to_dict(model.config), "gates": [to_dict(gate) for gate in gates]}
        session.accept(config=config.defining(), **settings)
        _check_no_other_gates(config, session)
        rows, held_out = _load_dataset(config, model, dataset, gates[0].block_size, session)
        task, trained, frozen = Distillation.start(model, config)
        save = functools.partial(_save_gates, config, hf_config)
        on_checkpoint = None if config.output is None else save
        result = run(task, trained, frozen, rows, session, held_out=held_out, on_checkpoint=on_checkpoint)
    return dataclasses.replace(result, gates=() if config.output is None else _gate_folders(config))


def _gate_folders(config: DistillConfig) -> tuple[Path, ...]:
    """The folder of each trained gate."""
    assert config.output is not None
    return tuple(Path(config.output) / name for name in config.kind.attributes)


def _check_no_other_gates(config: DistillConfig, session: Session) -> None:
    """Raises FileExistsError where a run that starts would write over the gates of another one."""
    if session.folder is None or session.step:
        return
    # A disk that was full may have left an empty folder.
    if there := [f for f in _gate_folders(config) if f.exists() and not (f.is_dir() and not any(f.iterdir()))]:
        raise FileExistsError(
            f"A run that starts must not write over gates; {there[0]} is there, without checkpoints of the run that made it. Give another "
            "`output`, or remove that one."
        )


def _save_gates(config: DistillConfig, hf_config: Mapping[str, Any] | None, model: Transformer, step: int) -> None:
    """Writes each trained gate to its folder, with the number of steps that it has been trained, and its target."""
    training = {"step": step, "steps": config.steps, "finished": step >= config.steps, "target": config.target}
    for name, folder in zip(config.kind.attributes, _gate_folders(config), strict=True):
        save_gates(getattr(model, name), folder, base_model=config.model, hf_config=hf_config, training=training)


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
    _check_config(config, FinetuneConfig)
    config = absolute(config)
    _check_model(config, model)
    _check_text(config, dataset)
    with open_session(config, progress) as session:
        model = _load_model(config, model, session)
        _check_context(config, model)
        session.accept(config=config.defining(), model=to_dict(model.config))
        rows, held_out = _load_dataset(config, model, dataset, config.block_size, session)
        packed = bool((rows.lengths != rows.row_length).any()) or len(rows.lengths) != len(rows)
        if held_out is not None:
            packed = (
                packed
                or bool((held_out.lengths != held_out.row_length).any())
                or len(held_out.lengths) != len(held_out)
            )
        task, trained, frozen = LanguageModelling.start(model, packed=packed)
        del model  # its weights are not needed beside their float32 copies
        return run(task, trained, frozen, rows, session, held_out=held_out)


def _check_config(config: Any, kind: type[TrainConfig]) -> None:
    """Raises ValueError where the settings are not those of this kind of training."""
    if not isinstance(config, kind):
        got = type(config).__name__ if dataclasses.is_dataclass(config) else repr(config)
        raise ValueError(f"config must be a {kind.__name__}; got {got}. Make one: {kind.__name__}(model=...).")


def _check_model(config: TrainConfig, model: Transformer | None) -> None:
    """Raises ValueError where there is no model to train; nothing is made in the output folder then."""
    if model is not None:
        check_model(model)
    elif not config.model:
        raise ValueError("Training needs a base model; got model=''. Set `model` to a folder or hub id.")


def _check_text(config: TrainConfig, dataset: PackedDataset | np.ndarray | None) -> None:
    """Raises ValueError or OSError where a run that starts has no text, before its model is loaded; one that goes on keeps its tokens."""
    if dataset is None and (config.output is None or not (Path(config.output) / "checkpoints").exists()):
        check_sources(config.data)


def _load_model(config: TrainConfig, model: Transformer | None, session: Session) -> Transformer:
    """The model to start from; a given one is not changed, though its arrays are shared."""
    if model is not None:
        return nnx.merge(*nnx.split(model))
    session.begin(f"loading {config.model}")
    from seer_jax.models.pretrained import from_pretrained

    return from_pretrained(config.model, dtype=config.dtype)


def _attach_gates(config: DistillConfig, model: Transformer) -> list[GateConfig]:
    """Gives the model the gates that it lacks; returns the configurations of those that train."""
    rngs = nnx.Rngs(config.seed)
    names = config.kind.attributes
    _load_initial_gates(config, model, names)
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


def _load_initial_gates(config: DistillConfig, model: Transformer, names: Sequence[str]) -> None:
    """Gives the model the gates that training starts from."""
    for location in resolve_gates(config.initial_gates, GATE_PATTERNS):
        gate = load_gates(location, model.config)
        name = "prefill_gate" if isinstance(gate.config, PrefillGateConfig) else "decode_gate"
        kind = name.removesuffix("_gate")
        if name not in names:
            raise ValueError(
                f"initial_gates must be gates that are trained (kind={config.kind}); {location} holds a {kind} gate. Leave it out, or set "
                f"kind={kind} or kind=both."
            )
        if getattr(model, name) is not None:
            raise ValueError(
                f"initial_gates must hold one {kind} gate for a model without any; {location} is a second one."
            )
        wanted = getattr(config, kind)
        if wanted not in (gate.config, type(wanted)()):
            given, made = to_dict(wanted), to_dict(gate.config)
            rules = [f"{kind}.{name}={made[name]}" for name in given if given[name] != made[name]]
            got = [f"{given[name]}" for name in given if given[name] != made[name]]
            raise ValueError(
                f"The settings of a gate must be those of its initial gate, {location}: {', '.join(rules)}; got {', '.join(got)}. Set them "
                f"so, or leave out all settings of the {kind} gate."
            )
        model.attach(gate)


def _check_context(config: TrainConfig, model: Transformer) -> None:
    """Raises ValueError where rows are longer than what the model takes; nothing is made in the output folder then."""
    length, context = config.sequence_length, model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"sequence_length must be at most the model's context of {context} tokens; got {length}. Lower it, or take a model "
            "whose RoPE is scaled for longer sequences."
        )


def _load_dataset(
    config: TrainConfig,
    model: Transformer,
    dataset: PackedDataset | np.ndarray | None,
    block_size: int,
    session: Session,
) -> tuple[PackedDataset, PackedDataset | None]:
    """Rows to train on and rows held out, which the run's settings then name."""
    dataset = _read_dataset(config, model, dataset, block_size, session)
    session.say(f"Training data: {dataset.report}")
    session.accept(data={"digest": dataset.digest, "rows": len(dataset)})
    return hold_out(dataset, config.data.held_out_rows, seed=config.seed)


def _read_dataset(
    config: TrainConfig,
    model: Transformer,
    dataset: PackedDataset | np.ndarray | None,
    block_size: int,
    session: Session,
) -> PackedDataset:
    length, vocab_size = config.sequence_length, model.config.vocab_size
    if dataset is None:
        session.begin("reading training text")
        return load_dataset(
            config.data,
            model=config.model,
            vocab_size=vocab_size,
            row_length=length,
            block_size=block_size,
            rows=config.rows,
            cache=session.folder and session.folder / "tokens",
            resumes=bool(session.step),
            say=session.say,
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

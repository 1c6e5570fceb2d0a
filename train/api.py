"""Training in one call: `distill` and `finetune`."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from seer_jax.convert import load_adapter, load_gates, save_gates
from seer_jax.convert.adapters import WEIGHTS as ADAPTER_WEIGHTS
from seer_jax.convert.adapters import resolve_adapter
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gates import GATE_PATTERNS
from seer_jax.folders import fingerprint
from seer_jax.gates.configs import GateConfig, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.lora import adapted, lora_config
from seer_jax.models.config import RopeKind
from seer_jax.models.decoder import Transformer, check_model
from seer_jax.models.hub import read_config, resolve, resolve_gates
from seer_jax.sharding import make_mesh, place
from seer_jax.sharding.processes import ending_together, first_alone, is_first
from seer_jax.train import finetuning
from seer_jax.train.config import DistillConfig, FinetuneConfig, TargetStatistic, TrainConfig, absolute, to_dict
from seer_jax.train.data.batches import hold_out, load_dataset
from seer_jax.train.data.packing import PackedDataset
from seer_jax.train.data.sources import check_sources
from seer_jax.train.data.store import check_tokens
from seer_jax.train.joint import JointTraining
from seer_jax.train.loop.run import TrainResult, rows_at_once, run
from seer_jax.train.loop.session import ProgressFunction, Session, open_session
from seer_jax.train.step import FrozenWeights, Task, Weights
from seer_jax.train.tasks import Distillation, LanguageModelling


@ending_together()
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
    mesh = _make_mesh(config, model)
    with open_session(config, progress) as session:
        given, model = model, _load_model(config, model, mesh, session)
        hf_config = None
        # Made before training, so that a model which config.json cannot describe is refused now.
        if config.output is not None:
            hf_config = finetuning.describe(model.config, _config_json(config, given))
        _check_context(config, model)
        config, gates = _attach_gates(config, model)
        settings = {"model": to_dict(model.config), "gates": [to_dict(gate) for gate in gates]}
        session.accept(config=config.defining(), frozen=_fingerprints(config, given), **settings)
        _check_no_others(session, () if config.output is None else _gate_folders(config), "gates")
        rows, held_out = _load_dataset(config, model, dataset, gates[0].block_size, session)
        task, trained, frozen = Distillation.start(model, config)
        save = functools.partial(_save_gates, config, hf_config)
        on_checkpoint = None if config.output is None else save
        result = run(task, trained, frozen, rows, session, held_out=held_out, on_checkpoint=on_checkpoint)
    return dataclasses.replace(result, gates=() if config.output is None else _gate_folders(config))


def _config_json(config: TrainConfig, given: Transformer | None) -> Mapping[str, Any]:
    """The `config.json` of the named base model; of a given model there is none."""
    return {} if given is not None else read_config(resolve(config.model, ("config.json",)))


def _fingerprints(config: TrainConfig, given: Transformer | None) -> dict[str, str]:
    """Of the files whose weights a run reads and does not train, by what they are: a run that goes on must find them as they were."""
    found = {}
    if given is None:
        found["base model"] = fingerprint(resolve(config.model, BASE_PATTERNS), ("model*.safetensors",))
    if isinstance(config, DistillConfig) and config.adapter is not None:
        found["adapter"] = fingerprint(resolve_adapter(config.adapter), (ADAPTER_WEIGHTS,))
    return found


def _gate_folders(config: DistillConfig) -> tuple[Path, ...]:
    """The folder of each trained gate."""
    assert config.output is not None
    return tuple(Path(config.output) / name for name in config.kind.attributes)


def _check_no_others(session: Session, folders: Sequence[Path], what: str) -> None:
    """Raises FileExistsError where a run that starts would write over the gates or the model of another one."""
    if session.folder is None or session.step:
        return
    # A disk that was full may have left an empty folder.
    if there := [f for f in folders if f.exists() and not (f.is_dir() and not any(f.iterdir()))]:
        raise FileExistsError(
            f"A run that starts must not write over {'gates' if what == 'gates' else f'a {what}'}; {there[0]} is there, without checkpoints "
            "of the run that made it. Give another `output`, or remove that one."
        )


def _save_gates(config: DistillConfig, hf_config: Mapping[str, Any] | None, model: Transformer, step: int) -> None:
    """Writes each trained gate to its folder, with the number of steps that it has been trained, and its target."""
    gates = [getattr(model, name) for name in config.kind.attributes]
    if model.layout is not None:
        gates = model.layout.everywhere(gates)
    if not is_first():
        return
    training = {"step": step, "steps": config.steps, "finished": step >= config.steps, "target": config.target}
    for gate, folder in zip(gates, _gate_folders(config), strict=True):
        save_gates(gate, folder, base_model=config.model, hf_config=hf_config, training=training)


@ending_together()
def finetune(
    config: FinetuneConfig,
    *,
    model: Transformer | None = None,
    dataset: PackedDataset | np.ndarray | None = None,
    progress: ProgressFunction | None = None,
) -> TrainResult:
    """Trains all base weights, or LoRA adapters, by the language-model loss or, with `config.distil`, to give the next-token
    distributions that the base model gives with dense attention.

    Attention is dense, and gates of the model stay as they are. With `config.initial_gates` the prefill gate that they name takes the
    place of one that the model carries and is trained along, and attention is sparse on its lists.

    Takes and raises what `distill` does. With an output folder the model is written to `model` in it, at each checkpoint and when the run
    is stopped; of a run with `config.lora` the adapter is written to `adapter` then, in PEFT's layout, and the model with the adapter in
    its weights to `model` at the end of the run. A gate that is trained along is written to `prefill_gate`.

    Weights that train and their moments are float32, so that a weight takes 16 bytes with its gradient; the arithmetic is of the model's
    dtype. Only the hidden states between layers are kept for the backward pass, which computes the layers again.

    Args:
      config: the run. With `config.yarn_factor` the model computes, and is written, with YaRN.
      model: the base model; None: it is read from `config.model`. It is not changed. An adapter that it carries is trained further.
      dataset: see `distill`.
      progress: see `distill`.

    Returns:
      The model, with its adapter where adapters were trained and the gate that was trained along, and where each was written.
    """
    _check_config(config, FinetuneConfig)
    finetuning.check(config, reads_text=dataset is None)
    config = absolute(config)
    _check_model(config, model)
    _check_text(config, dataset)
    mesh = _make_mesh(config, model)
    with open_session(config, progress) as session:
        given = model
        tokenizer = None if given is not None else finetuning.tokenizer_of(config.model)
        model = _load_model(config, model, mesh, session)
        config = finetuning.prepare(config, model)
        _check_context(config, model)
        adapter, gate = lora_config(model), model.prefill_gate if config.initial_gates else None
        settings = {"adapter": adapter and to_dict(adapter), "gate": None if gate is None else to_dict(gate.config)}
        frozen = _fingerprints(config, given) if adapted(model) else {}
        session.accept(config=config.defining(), model=to_dict(model.config), weights=settings, frozen=frozen)
        _check_no_others(session, finetuning.folders(config), "model")
        _check_no_others(session, finetuning.gate_folders(config), "gates")
        hf = None if config.output is None else finetuning.describe(model.config, _config_json(config, given))
        rows, held_out = _load_dataset(config, model, dataset, config.block_size, session)
        packed = finetuning.is_packed(rows) or (held_out is not None and finetuning.is_packed(held_out))
        task, trained, frozen = _start_finetuning(config, model, packed)
        adapts = bool(adapted(model))
        del model  # its weights are not needed beside their float32 copies
        save = None if config.output is None else functools.partial(finetuning.write, config, hf, tokenizer)
        result = run(task, trained, frozen, rows, session, held_out=held_out, on_checkpoint=save)
    if config.output is None:
        return result
    saved, adapter = finetuning.folders(config)
    gates = finetuning.gate_folders(config)
    return dataclasses.replace(result, saved=saved, adapter=adapter if adapts else None, gates=gates)


def _start_finetuning(config: FinetuneConfig, model: Transformer, packed: bool) -> tuple[Task, Weights, FrozenWeights]:
    """The task of the settings, the weights that train, and the others."""
    if not config.initial_gates:
        return LanguageModelling.start(model, packed=packed)
    if packed:
        raise finetuning.several_sequences("rows of several, or with padding")
    return JointTraining.of(config, model)


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
    if dataset is None and is_first() and (config.output is None or not (Path(config.output) / "checkpoints").exists()):
        check_sources(config.data)


def _make_mesh(config: TrainConfig, model: Transformer | None) -> Mesh | None:
    """The mesh of the settings; None: one device, or the mesh of a given model.

    Raises:
      ValueError: there are several processes, and the mesh does not have the devices of all.
    """
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    processes, devices = jax.process_count(), jax.device_count()
    if processes > 1 and (mesh is not None or model is None or model.layout is None):
        size = 1 if mesh is None else mesh.size
        if size != devices:
            raise ValueError(
                f"Training by {processes} processes must use the devices of all, {devices}; got mesh={config.mesh}, which is {size}. Set "
                'mesh="data=-1", or sizes whose product is their number.'
            )
    return mesh


def _load_model(config: TrainConfig, model: Transformer | None, mesh: Mesh | None, session: Session) -> Transformer:
    """The model to start from, on the mesh; a given one is not changed, though its arrays are shared."""
    start = _start(config, model, mesh, session)
    rows_at_once(config, start.layout)
    return start


def _start(config: TrainConfig, model: Transformer | None, mesh: Mesh | None, session: Session) -> Transformer:
    adapter = config.adapter if isinstance(config, DistillConfig) else None
    if isinstance(config, FinetuneConfig) and config.from_scratch:
        model = finetuning.untrained(config, model)
    if model is not None:
        own: Transformer = nnx.merge(*nnx.split(model))
        own = own if mesh is None or mesh.size == 1 else place(own, mesh)
        return own if adapter is None else load_adapter(adapter, own, base=config.model or None)
    session.begin(f"loading {config.model}")
    from seer_jax.models.pretrained import from_pretrained

    return from_pretrained(config.model, adapter=adapter, dtype=config.dtype, mesh=mesh)


def _attach_gates(config: DistillConfig, model: Transformer) -> tuple[DistillConfig, list[GateConfig]]:
    """Gives the model the gates that it lacks; returns the settings with their target, and the configurations of the gates that train."""
    rngs = nnx.Rngs(config.seed)
    names = config.kind.attributes
    _load_initial_gates(config, model, names)
    target = _target(config, [gate for name in names if (gate := getattr(model, name)) is not None])
    for name in names:
        if getattr(model, name) is None:
            model.add_gate(getattr(config, name.removesuffix("_gate")), rngs=rngs)
        getattr(model, name).distilled_on = target.value
        if model.layout is not None:
            model.attach(model.layout.placed(getattr(model, name)))
    gates = [getattr(model, name).config for name in names]
    sizes = sorted({gate.block_size for gate in gates})
    if len(sizes) > 1 or config.sequence_length % sizes[0]:
        raise ValueError(
            "The gates must have one block size, and it must divide sequence_length; "
            f"got block sizes {sizes} and sequence_length={config.sequence_length}."
        )
    return dataclasses.replace(config, target=target), gates


def _target(config: DistillConfig, gates: Sequence[PrefillGate | DecodeGate]) -> TargetStatistic:
    """What gates learn: what the settings say, otherwise what those that are trained further were distilled on."""
    if config.target is not None:
        return config.target
    known = {gate.distilled_on: gate.phase for gate in gates if gate.distilled_on is not None}
    if len(known) > 1:
        listed = " and ".join(f"{target} ({phase} gate)" for target, phase in known.items())
        raise ValueError(
            f"Gates that are trained further together must have one target; got {listed}. Choose one (target, --target), or train one gate "
            "after the other (kind)."
        )
    return TargetStatistic(next(iter(known), TargetStatistic.MAX))


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
    length, context = config.sequence_length, model.config.context
    if length <= context:
        return
    remedy = "take a model whose RoPE is scaled for longer sequences"
    if isinstance(config, FinetuneConfig) and config.yarn_factor is None and model.config.rope.kind is RopeKind.DEFAULT:
        remedy = f"stretch the context with yarn_factor={-(-length // context)}"
    raise ValueError(
        f"sequence_length must be at most the model's context of {context} tokens; got {length}. Lower it, or {remedy}."
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
        # The first process reads and keeps the text, the others what it kept.
        with first_alone() if session.folder else contextlib.nullcontext():
            return load_dataset(
                config.data,
                model=config.model,
                vocab_size=vocab_size,
                row_length=length,
                block_size=block_size,
                rows=config.rows,
                cache=session.folder and session.folder / "tokens",
                resumes=bool(session.step) or not is_first(),
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

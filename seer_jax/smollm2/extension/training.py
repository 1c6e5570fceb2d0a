"""The stages that train. The only module of the extension that imports `seer_jax.train`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seer_jax import tiny_lm
from seer_jax.gates.configs import PrefillGateConfig, TrainedGates
from seer_jax.models.config import DType
from seer_jax.models.hub import named_gates
from seer_jax.smollm2.extension.config import BLOCK_SIZE, GATE_DIM, ExtensionConfig, Stage

REPORTS = 10  # lines of a run
CHECKPOINTS = 5  # of a run, where none is asked for
CURVE = 20  # losses of a run from scratch that are reported
Say = Callable[[str], None]


def folder(config: ExtensionConfig, stage: Stage) -> Path:
    """Where a stage writes."""
    return config.output / stage.value


def train(config: ExtensionConfig, stage: Stage, say: Say) -> int:
    """Runs a stage that trains, or goes on with one that was stopped; returns the tokens that it is trained on.

    Raises:
      ValueError, OSError, MemoryError, FloatingPointError, KeyboardInterrupt, SystemExit: see `seer_jax.train.distill`.
    """
    from seer_jax.train import distill, finetune

    run: Any = {
        Stage.YARN: _yarn,
        Stage.GATES: _gates,
        Stage.JOINT: _joint,
        Stage.DISTIL: _distil,
    }[stage](config, folder(config, stage))
    result = (distill if stage is Stage.GATES else finetune)(run, progress=_report(run.steps, say))
    return result.step * run.batch_size * run.sequence_length


def train_from_scratch(config: ExtensionConfig, say: Say) -> dict[str, Any]:
    """Trains random weights of tiny-lm's shape on the same text, with dense attention and with a gate from the first step on; returns
    tokens and both losses by step, JSON."""
    from seer_jax.train import FinetuneConfig, OptimizerConfig, finetune

    curves: dict[str, Any] = {}
    gate = str(named_gates("tiny-lm-release")["prefill"])
    sparse: Any = {"initial_gates": (gate,), "density": config.scratch_density}
    for name, settings in (("dense", {}), ("sparse", sparse)):
        place, say_of = folder(config, Stage.SCRATCH) / name, _titled(name, say)
        run = FinetuneConfig(
            **_common(config, place, config.scratch_steps, tiny_lm.NAME),
            sequence_length=config.scratch_length,
            batch_size=config.scratch_batch_size,
            micro_batch_size=config.scratch_batch_size
            // next(n for n in (4, 2, 1) if not config.scratch_batch_size % n),
            optimizer=OptimizerConfig(learning_rate=3e-3, end_learning_rate=3e-4),
            from_scratch=True,
            **settings,
        )
        finetune(run, progress=_report(run.steps, say_of))
        curves[name] = _curve(place / "metrics.jsonl")
    return {"tokens": config.scratch_steps * config.scratch_batch_size * config.scratch_length, **curves}


def _yarn(config: ExtensionConfig, place: Path) -> Any:
    from seer_jax.train import FinetuneConfig, OptimizerConfig

    return FinetuneConfig(
        **_common(config, place, config.steps),
        **_rows(config),
        optimizer=OptimizerConfig(learning_rate=config.learning_rate),
        yarn_factor=config.factor,
    )


def _joint(config: ExtensionConfig, place: Path) -> Any:
    from seer_jax.train import FinetuneConfig, OptimizerConfig

    return FinetuneConfig(
        **_common(config, place, config.steps),
        **_rows(config),
        optimizer=OptimizerConfig(learning_rate=config.learning_rate),
        yarn_factor=config.factor,
        initial_gates=(config.initial_gate,),
        density=config.density,
        gate_learning_rate=config.gate_learning_rate,
    )


def _gates(config: ExtensionConfig, place: Path) -> Any:
    from seer_jax.train import DistillConfig, OptimizerConfig

    return DistillConfig(
        **_common(config, place, config.gate_steps or config.steps, _model(config)),
        **_rows(config),
        optimizer=OptimizerConfig(learning_rate=config.gate_learning_rate),
        kind=TrainedGates.PREFILL,
        prefill=PrefillGateConfig(block_size=BLOCK_SIZE, gate_dim=GATE_DIM),
    )


def _distil(config: ExtensionConfig, place: Path) -> Any:
    from seer_jax.train import FinetuneConfig

    return FinetuneConfig.lora_recipe(
        **_common(config, place, config.distil_steps, _model(config)),
        **_rows(config),
        initial_gates=(str(folder(config, Stage.GATES) / "prefill_gate"),),
        density=config.density,
        distil=True,
    )


def _model(config: ExtensionConfig) -> str:
    """The model with YaRN.

    Raises:
      FileNotFoundError: its stage is not finished.
    """
    place = folder(config, Stage.YARN) / "model"
    if not place.is_dir():
        raise FileNotFoundError(
            f"This stage needs the model of the stage {Stage.YARN}; {place} is not there. Run that first."
        )
    return str(place)


def _common(config: ExtensionConfig, place: Path, steps: int, model: str | None = None) -> dict[str, Any]:
    from seer_jax.train import DataConfig

    return {
        "model": model or config.model,
        "output": str(place),
        "data": DataConfig(paths=(str(config.train),)),
        "steps": steps,
        "dtype": config.dtype or DType.default(),
        "seed": config.seed,
        "checkpoint_interval": config.checkpoint_interval or max(1, steps // CHECKPOINTS),
        "keep_checkpoints": 1,
        "tensorboard": False,
    }


def _rows(config: ExtensionConfig) -> dict[str, Any]:
    return {
        "sequence_length": config.length,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
    }


def _titled(name: str, say: Say) -> Say:
    return lambda line: say(f"{name}: {line}")


def _report(steps: int, say: Say) -> Callable[[Any], None]:
    """Says a few of a run's steps."""

    def show(report: Any) -> None:
        if report.step % max(1, steps // REPORTS) == 0 or report.step == steps:
            say(str(report))

    return show


def _curve(metrics: Path) -> list[dict[str, float]]:
    """Step and loss of the language model, of some steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["step"] == 1 or row["step"] % max(1, len(rows) // CURVE) == 0]
    return [{"step": row["step"], "loss": row.get("lm_loss", row["loss"])} for row in chosen]

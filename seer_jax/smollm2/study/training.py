"""Distillation of a variant by `distill`, and what it cost. The only module of the study that imports `seer_jax.train`."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.smollm2.study.config import StudyConfig
from seer_jax.smollm2.study.texts import write_mix
from seer_jax.smollm2.study.variants import BLOCK_SIZE, Text, Variant

CHARACTERS_PER_TOKEN = 6  # at most, of the texts that are made
REPORTS = 4  # lines of a run
MANY_BLOCKS = 64  # of a cache, which has room for groups of blocks
LAST_STEPS = 0.1  # share of the steps over which block recall at the end is averaged


def training_folder(config: StudyConfig, name: str) -> Path:
    """Folder of a variant's run."""
    return config.output / name / "training"


def read_rows(config: StudyConfig, model: Transformer, text: Text, steps: int) -> Any:
    """Rows of tokens for so many steps, a `PackedDataset`; kept in the output folder."""
    from seer_jax.train import DataConfig, load_dataset

    rows = steps * config.batch_size
    path, tokens = config.train, config.output / "tokens"
    if text is not Text.DOCUMENTATION:
        characters = rows * config.length * CHARACTERS_PER_TOKEN
        path = write_mix(text, _pages(config), config.output / "texts", characters=characters, seed=config.seed)
    return load_dataset(
        DataConfig(paths=(str(path),)),
        model=config.model,
        vocab_size=model.config.vocab_size,
        row_length=config.length,
        block_size=BLOCK_SIZE,
        rows=rows,
        cache=tokens / f"{text}-{rows}",
    )


def calibration_rows(config: StudyConfig, model: Transformer, count: int) -> Int[np.ndarray, "rows T"]:
    """The first rows of the training text."""
    dataset = read_rows(config, model, Text.DOCUMENTATION, config.steps)
    return np.stack([dataset[row].tokens for row in range(min(count, len(dataset)))])


def train(
    config: StudyConfig, model: Transformer, variant: Variant, say: Callable[[str], None]
) -> tuple[Transformer, dict[str, Any]]:
    """Distils both gates, or goes on with a run that was stopped; returns the model with them, and what they cost, JSON.

    Raises:
      ValueError, MemoryError, FloatingPointError: see `distill`.
    """
    from seer_jax.train import DistillConfig, OptimizerConfig, StepReport, TargetStatistic, distill

    steps = config.steps * variant.times

    def show(report: StepReport) -> None:
        if report.step % max(1, steps // REPORTS) == 0 or report.step == steps:
            say(str(report))

    run = DistillConfig(
        model=config.model,
        output=str(training_folder(config, variant.name)),
        kind=TrainedGates.BOTH,
        prefill=variant.prefill,
        decode=variant.decode,
        target=TargetStatistic(variant.target),
        sequence_length=config.length,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        steps=steps,
        decode_stride=config.decode_stride,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate),
        seed=config.seed,
        checkpoint_interval=max(1, steps // 2),
        keep_checkpoints=1,
        tensorboard=False,
    )
    result = distill(run, model=model, dataset=read_rows(config, model, variant.text, steps), progress=show)
    found = {"steps": result.step, "tokens": steps * config.batch_size * config.length}
    return result.model, {**found, **_speed(training_folder(config, variant.name)), **gate_costs(result.model)}


def _speed(folder: Path) -> dict[str, Any]:
    """Tokens per second, and loss and block recall at the end."""
    from seer_jax.train.loop.metrics import read_metrics

    lines = read_metrics(folder / "metrics.jsonl")
    last = lines[-max(1, round(LAST_STEPS * len(lines))) :]
    found: dict[str, Any] = {"tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines]))}
    for name in ("prefill_loss", "decode_loss", "prefill_recall", "decode_recall"):
        found[name] = float(np.mean([line[name] for line in last]))
    return found


def gate_costs(model: Transformer) -> dict[str, Any]:
    """Parameters of each gate, and bytes of its keys per token in all layers, beside those of the model's keys and values."""
    prefill, decode = model.prefill_gate, model.decode_gate
    assert prefill is not None and decode is not None
    bare = _cache_bytes(model, None, None)
    return {
        "prefill_parameters": _parameters(prefill),
        "decode_parameters": _parameters(decode),
        "prefill_key_bytes": _cache_bytes(model, None, prefill.config) - bare,
        "decode_key_bytes": _cache_bytes(model, decode.config, None) - bare,
        "model_key_bytes": bare,
    }


def _parameters(gate: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(gate)))


def _cache_bytes(
    model: Transformer, decode_gate: DecodeGateConfig | None, prefill_gate: PrefillGateConfig | None
) -> float:
    """Of a token, without what does not grow with tokens."""

    def leaves(capacity: int) -> list[jax.Array]:
        cache = Cache.create(model.config, 1, capacity, model.dtype, decode_gate=decode_gate, prefill_gate=prefill_gate)
        return jax.tree.leaves(cache)

    def size(blocks: int) -> int:
        return tree_bytes(jax.eval_shape(functools.partial(leaves, blocks * BLOCK_SIZE)))

    return (size(2 * MANY_BLOCKS) - size(MANY_BLOCKS)) / (MANY_BLOCKS * BLOCK_SIZE)


def _pages(config: StudyConfig) -> Iterator[str]:
    """The documents of the training text."""
    from seer_jax.train.data.sources import SourceConfig, read_documents

    return (str(document) for document in read_documents(SourceConfig(paths=(str(config.train),))))

"""`seer-jax bench train`: a step of distillation, or of fine-tuning, beside a dense forward of the same tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seer_jax.bench.configs import FinetuningStep, TrainBench, gate_settings
from seer_jax.bench.harness.clock import Timing, time_calls
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure, not_finite, run_program
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import MILLISECONDS, PROGRAM, Column, Table, report
from seer_jax.bench.models import random_model
from seer_jax.gates.configs import TrainedGates
from seer_jax.lora import add_lora
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.sharding.table import DATA, FSDP

TRAINING = Table(
    "training",
    "Distillation, one step",
    (
        MILLISECONDS,
        Column(
            "forward\nms", "forward_milliseconds", ".4g", "dense forward of the same rows up to the last hidden states"
        ),
        Column("of\nforward", "of_forward", ".3f", "the step's ms over the forward's"),
        Column("model\nTFLOP/s", "tflops", ".3g", "flop of that forward alone, over the time of the step"),
        Column("of 700", "share_of_700", ".0%", "that rate over 700 TFLOP/s"),
        *PROGRAM,
        Column("GPU\nhours", "recipe_hours", ".3g", "for the 0.52 billion tokens of the authors' prefill recipe"),
    ),
)
FINETUNING = Table(
    "fine-tuning",
    "Fine-tuning, one step",
    (
        MILLISECONDS,
        Column(
            "forward\nms", "forward_milliseconds", ".4g", "dense forward of the same rows up to the last hidden states"
        ),
        Column("of\nforward", "of_forward", ".3f", "the step's ms over the forward's"),
        Column("tokens/s", "tokens_per_second", ",.0f", "tokens of the rows over the time of the step"),
        *PROGRAM,
    ),
)
PANEL = Panel(
    "a step of distillation",
    TRAINING.name,
    colour=lambda m: f"{m.settings['gates']} gates",
    style=lambda m: f"{m.settings['rows']} rows",
    y="of_forward",
    y_label="time over a dense forward's",
)
FULL_RATE = 700e12  # flop per second, about what bfloat16 products reach on an H200
RECIPE_TOKENS = 500 * 16 * 65536  # of the authors' prefill recipe


def bench_training(config: TrainBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_training(config), (TRAINING, FINETUNING), (PANEL,))


def measure_training(config: TrainBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there, the shortest rows first.

    Raises:
      ValueError: a shape that the device is too slow for.
    """
    config.check_device()
    model = random_model(config.model, config.prefill, config.decode, seed=config.seed)
    forward = jax.jit(lambda model, tokens: model.hidden_states(tokens)[0])
    for length in sorted(config.lengths):
        shape = (config.batch_size, length)
        tokens = jax.random.randint(jax.random.key(config.seed), shape, 0, model.config.vocab_size)
        forward_timing = functools.cache(functools.partial(time_calls, forward, model, tokens[:1]))
        for gates in config.kinds:
            settings = dict(model=config.shape.value, length=length, gates=gates.value, rows=config.batch_size)
            settings |= dict(dtype=str(model.dtype)) | gate_settings(config.prefill, config.decode)
            run = functools.partial(_step, model, gates, tokens, forward_timing)
            yield measure(TRAINING.name, f"{length}, {gates.value}", settings, run)
        for step in config.finetune:
            settings = dict(model=config.shape.value, length=length, step=step.value, rows=config.batch_size)
            settings |= dict(dtype=str(model.dtype))
            settings |= dict(density=config.density) | gate_settings(config.prefill) if step.is_sparse else {}
            run = functools.partial(_finetuning, model, step, config.density, tokens, forward_timing)
            yield measure(FINETUNING.name, f"{length}, {step.value}", settings, run)


def forward_flop(config: ModelConfig, length: int) -> float:
    """Floating-point operations of a dense forward of one row, up to the last hidden states.

    Two per token and weight of the projections and the MLP; 4 H D for each of the T (T + 1) / 2 pairs of a query and a key
    that causal attention lets it see. Norms, RoPE and softmax are not counted, the output head is not run.
    """
    width, dim = config.hidden_size, config.head_dim
    projections = 2 * width * dim * (config.num_heads + config.num_kv_heads)
    weights = projections + 3 * width * config.intermediate_size
    pairs = length * (length + 1) / 2
    return config.num_layers * (2.0 * length * weights + 4 * config.num_heads * dim * pairs)


def distillation_step(
    model: Transformer, kind: TrainedGates, tokens: Int[np.ndarray, "B T"]
) -> tuple[Callable[..., tuple[Any, dict[str, Array]]], Any, tuple]:
    """A step of distillation as a program of (carried, *arguments) -> (carried, metrics), and its arguments; each row is one sequence, and
    a device works off its rows one at a time."""
    from seer_jax.train.config import DistillConfig
    from seer_jax.train.tasks import Distillation

    rows, length = tokens.shape
    config = DistillConfig(kind=kind, sequence_length=length, batch_size=rows)
    return _program(config, *Distillation.start(model, config), model, tokens)


def finetuning_step(
    model: Transformer,
    tokens: Int[np.ndarray, "B T"],
    *,
    step: FinetuningStep = FinetuningStep.FULL,
    density: float = 0.1,
) -> tuple[Callable[..., tuple[Any, dict[str, Array]]], Any, tuple]:
    """A step of fine-tuning, as `distillation_step`; without `step` of all base weights, with dense attention."""
    from seer_jax.train.config import FinetuneConfig
    from seer_jax.train.joint import JointTraining
    from seer_jax.train.tasks import LanguageModelling

    rows, length = tokens.shape
    recipe = FinetuneConfig.lora_recipe if step.adapts else FinetuneConfig.full_recipe
    config = recipe(sequence_length=length, batch_size=rows)
    if step.adapts:
        model = add_lora(nnx.merge(*nnx.split(model)), config.lora)
    if step.is_sparse:
        return _program(config, *JointTraining.start(model, density=density, weight=1.0), model, tokens)
    return _program(config, *LanguageModelling.start(model, packed=False), model, tokens)


def _program(
    config: Any, task: Any, trained: Any, frozen: Any, model: Transformer, tokens: Int[np.ndarray, "B T"]
) -> tuple:
    from seer_jax.train.data.batches import Batch, Place
    from seer_jax.train.data.packing import PackedRow
    from seer_jax.train.optimizer import make_optimizer, make_schedule
    from seer_jax.train.step import initial_state, make_step

    layout, (rows, length) = model.layout, tokens.shape
    devices = 1 if layout is None else layout.size(DATA, FSDP)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts=rows // devices)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    place = None if layout is None else Place(layout, rows)
    batch = Batch.of(PackedRow(tokens, np.ones_like(tokens), positions), place)

    def run(carried: tuple, frozen: Any, batch: Any) -> tuple[tuple, dict[str, Float[Array, ""]]]:
        trained, state, metrics = step(carried[0], carried[1], frozen, batch, jnp.int32(0))
        return (trained, state), metrics

    return run, (trained, initial_state(layout, optimizer, trained)), (frozen, batch)


def _finetuning(
    model: Transformer, step: FinetuningStep, density: float, tokens: Int[Array, "B T"], forward: Callable[[], Timing]
) -> Outcome:
    forward_milliseconds = tokens.shape[0] * forward().milliseconds
    run, carried, arguments = finetuning_step(model, np.asarray(tokens), step=step, density=density)
    program = run_program(run, carried, *arguments)
    milliseconds, metrics = program.timing.milliseconds, program.outputs
    results = {
        **program.timing._asdict(),
        "forward_milliseconds": forward_milliseconds,
        "of_forward": milliseconds / forward_milliseconds,
        "tokens_per_second": tokens.size / (milliseconds / 1e3),
        **program.results,
        **{name: float(value) for name, value in metrics.items() if "loss" in name or "recall" in name},
    }
    return Outcome(results, program.note, not_finite(**metrics))


def _step(model: Transformer, gates: TrainedGates, tokens: Int[Array, "B T"], forward: Callable[[], Timing]) -> Outcome:
    rows, length = tokens.shape
    forward_milliseconds = rows * forward().milliseconds
    run, carried, arguments = distillation_step(model, gates, np.asarray(tokens))
    program = run_program(run, carried, *arguments)
    milliseconds, metrics = program.timing.milliseconds, program.outputs
    rate = rows * forward_flop(model.config, length) / (milliseconds / 1e3)
    results = {
        **program.timing._asdict(),
        "forward_milliseconds": forward_milliseconds,
        "of_forward": milliseconds / forward_milliseconds,
        "tflops": rate / 1e12,
        "share_of_700": rate / FULL_RATE,
        **program.results,
        "recipe_hours": RECIPE_TOKENS / (rows * length) * milliseconds / 3.6e6,
        **{name: float(value) for name, value in metrics.items() if "loss" in name or "recall" in name},
    }
    return Outcome(results, program.note, not_finite(**metrics))

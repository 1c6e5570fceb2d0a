"""`seer-jax bench train`: a step of distillation beside a dense forward of the same tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seer_jax.bench.configs import TrainBench, gate_settings
from seer_jax.bench.harness.clock import Timing, time_calls
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure, not_finite, run_program
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import MILLISECONDS, PROGRAM, Column, Table, report
from seer_jax.bench.models import random_model
from seer_jax.gates.configs import TrainedGates
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer

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
    return report(config, measure_training(config), (TRAINING,), (PANEL,))


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


def _step(model: Transformer, gates: TrainedGates, tokens: Int[Array, "B T"], forward: Callable[[], Timing]) -> Outcome:
    from seer_jax.train.config import DistillConfig
    from seer_jax.train.data.batches import Batch
    from seer_jax.train.optimizer import make_optimizer, make_schedule
    from seer_jax.train.step import make_step
    from seer_jax.train.tasks import Distillation

    rows, length = tokens.shape
    forward_milliseconds = rows * forward().milliseconds
    config = DistillConfig(kind=gates, sequence_length=length, batch_size=rows)
    task, trained, frozen = Distillation.start(model, config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts=rows)
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape))

    def run(carried: tuple, frozen: Any, batch: Batch) -> tuple[tuple, dict[str, Float[Array, ""]]]:
        trained, state, metrics = step(carried[0], carried[1], frozen, batch, jnp.int32(0))
        return (trained, state), metrics

    program = run_program(run, (trained, optimizer.init(trained)), frozen, batch)
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

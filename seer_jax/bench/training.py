"""`seer-jax bench train`: a step of distillation beside a dense forward of the same tokens."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bench import Measurement, guarded, time_calls
from seer_jax.bench.models import CONFIGS, Shape, check_device, memory_results, peak_bytes, random_model
from seer_jax.bench.report import report
from seer_jax.gates.configs import DecodeGateConfig, Gates, PrefillGateConfig
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer

FULL_RATE = 700e12  # flop per second, about what bfloat16 products reach on an H200
RECIPE_TOKENS = 500 * 16 * 65536  # of the authors' prefill recipe


@dataclasses.dataclass(frozen=True)
class TrainBench:
    """Measures a step of distillation on this machine, beside a dense forward of the same tokens.

    Attributes:
      shape: size of the model.
      lengths: tokens per row.
      gates: which gates a step trains.
      batch_size: rows per step, worked off one at a time.
      seed: of weights and tokens.
      output: file for the measurements (JSON); None: none is written.
    """

    shape: Shape = Shape.LLAMA_3_1_8B
    lengths: tuple[int, ...] = (65536, 131072)
    gates: tuple[Gates, ...] = tuple(Gates)
    batch_size: int = 1
    seed: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.lengths or any(length < 128 or length % 64 for length in self.lengths):
            raise ValueError(f"lengths are whole blocks of 64 tokens, two at least; got {self.lengths}.")
        if not self.gates or self.batch_size < 1:
            raise ValueError(
                f"A step trains some gates on one row at least; got gates {self.gates} and batch_size={self.batch_size}."
            )


def measure_training(config: TrainBench) -> Iterator[Measurement]:
    """The measurements, each as soon as it is there, the shortest rows first.

    Raises:
      ValueError: a shape that this device is too slow for.
    """
    check_device(config.shape)
    both = PrefillGateConfig(), DecodeGateConfig()
    model = random_model(CONFIGS[config.shape], gates=both, seed=config.seed)
    for length in sorted(config.lengths):
        tokens = jax.random.randint(
            jax.random.key(config.seed), (config.batch_size, length), 0, model.config.vocab_size
        )
        forward = functools.cache(functools.partial(_forward_milliseconds, model, tokens))
        for gates in config.gates:
            settings = dict(model=config.shape.value, length=length, gates=gates.value, rows=config.batch_size)
            blank = Measurement("training", f"{length}, {gates.value}", settings | {"dtype": str(model.dtype)})
            yield guarded(functools.partial(_step, model, gates, tokens, forward, blank), blank)


def bench_training(config: TrainBench) -> list[Measurement]:
    """Prints the table, writes the file if it is asked for, and returns the measurements.

    Raises:
      ValueError: see `measure_training`.
    """
    return report(measure_training(config), config.output)[1]


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


def _forward_milliseconds(model: Transformer, tokens: Int[Array, "B T"]) -> float:
    """Of all rows, one after the other."""

    @jax.jit
    def forward(model: Transformer, tokens: Int[Array, "1 T"]) -> Float[Array, "1 T E"]:
        return model.hidden_states(tokens)[0]

    return len(tokens) * time_calls(forward, model, tokens[:1]).milliseconds


def _step(
    model: Transformer, gates: Gates, tokens: Int[Array, "B T"], forward: Callable[[], float], blank: Measurement
) -> Measurement:
    from seer_jax.train.config import DistillConfig
    from seer_jax.train.data.batches import Batch
    from seer_jax.train.optimizer import make_optimizer, make_schedule
    from seer_jax.train.step import make_step
    from seer_jax.train.tasks import Distillation

    rows, length = tokens.shape
    forward_milliseconds = forward()
    config = DistillConfig(gates=gates, sequence_length=length, batch_size=rows)
    task, trained, frozen = Distillation.start(model, config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(task, optimizer, make_schedule(config.optimizer, config.steps), parts=rows)
    batch = Batch(tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape))
    latest: list[Any] = [trained, optimizer.init(trained), None]
    del trained
    before = peak_bytes() or 0
    start = time.perf_counter()
    compiled = step.lower(*latest[:2], frozen, batch, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - start

    def run() -> dict[str, Float[Array, ""]]:
        latest[:] = compiled(*latest[:2], frozen, batch, jnp.int32(0))  # each step gives its weights to the next one
        return latest[2]

    timing = time_calls(run)
    memory, note = memory_results(compiled, before)
    rate = rows * forward_flop(model.config, length) / (timing.milliseconds / 1e3)
    results = {
        "milliseconds": timing.milliseconds,
        "spread": timing.spread,
        "forward_milliseconds": forward_milliseconds,
        "of_forward": timing.milliseconds / forward_milliseconds,
        "tflops": rate / 1e12,
        "share_of_700": rate / FULL_RATE,
        "compile_seconds": compile_seconds,
        **memory,
        "recipe_hours": RECIPE_TOKENS / (rows * length) * timing.milliseconds / 3.6e6,
        **{name: float(value) for name, value in latest[2].items() if "loss" in name or "recall" in name},
    }
    wrong = [name for name, value in latest[2].items() if not bool(jnp.isfinite(value))]
    fault = f"{', '.join(wrong)} not finite" if wrong else None
    return dataclasses.replace(blank, results=results, failure=fault, note=note)

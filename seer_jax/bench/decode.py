"""`seer-jax bench decode`: new tokens against a long cache, from the attention kernel to the whole model."""

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.backends import Implementation
from seer_jax.bench.decode_attention import DECODE_ATTENTION, measure_decode_attention
from seer_jax.bench.decode_layer import DECODE_LAYER, measure_layer
from seer_jax.bench.harness.baseline import Baseline
from seer_jax.bench.harness.clock import floor_results, memory_rate
from seer_jax.bench.harness.config import BenchConfig, ModelShape, check_densities
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure, run_program
from seer_jax.bench.harness.memory import default_device
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import report
from seer_jax.bench.harness.tables import FLOOR, LISTED, MEMORY, MILLISECONDS, PROGRAM, SPEEDUP, Column, Table
from seer_jax.bench.models import abstract_cache, random_cache, random_model
from seer_jax.bench.selection import parse_rules
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK

NEW_TOKENS = Table(
    "decode model",
    "Whole model, one new token of each sequence",
    (
        *(LISTED, MILLISECONDS),
        Column("tokens/s", "tokens_per_second", ".4g", "new tokens of all sequences"),
        *(*FLOOR, SPEEDUP, *PROGRAM, MEMORY),
    ),
)


class DecodePart(enum.StrEnum):
    """What is measured."""

    KERNEL = "kernel"
    LAYER = "layer"
    MODEL = "model"


@dataclasses.dataclass(frozen=True)
class DecodeBench(BenchConfig):
    """Measures decoding on this machine: the attention kernel, a layer's attention with its gate, and a whole model.

    Each result of the kernel is held against float32 before it is timed. The command fails if one is wrong. What the device
    has no memory for is left out with a note. The newest token counts among the tokens of a sequence.

    Attributes:
      batches: numbers of sequences.
      densities: shares of the blocks on the kernel's lists.
      model_density: share of the blocks that layer and model keep.
      policies: what chooses blocks where a layer is measured, as topk:0.1 or topk:0.1:window; none: top-k and a threshold
        of a gate.
      only: parts to measure.
      tokens: new ones of each sequence that the model makes in one run.
      implementation: of the attention kernel; None: the best one here. Layer and model always take the best one.
    """

    batches: tuple[int, ...] = (1, 8, 16)
    densities: tuple[float, ...] = (0.1,)
    model_density: float = 0.1
    policies: tuple[str, ...] = ()
    only: tuple[DecodePart, ...] = tuple(DecodePart)
    tokens: int = 16
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        self.check_lengths(2)
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must hold at least one sequence; got {self.batches}.")
        check_densities(*self.densities, self.model_density)
        parse_rules(self.policies)
        if not 1 <= self.tokens < min(self.lengths):
            raise ValueError(
                f"tokens must be part of the lengths, 1 to {min(self.lengths) - 1} of them; got tokens={self.tokens}."
            )
        if not self.only:
            raise ValueError(
                f"only must name parts to measure, some of {', '.join(DecodePart)}; got none. Leave it out for all."
            )


def bench_decode(config: DecodeBench) -> list[Measurement]:
    """Prints the tables, writes file and plot if they are asked for, and returns the measurements.

    Raises:
      ImportError: a plot is asked for and matplotlib is not installed.
      ValueError: see `measure_decode`.
    """
    return report(config, measure_decode(config), (DECODE_ATTENTION, DECODE_LAYER, NEW_TOKENS), PANELS)


def measure_decode(config: DecodeBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    memory_rate(default_device())  # while there is memory for it
    model, sizes, seed = config.shape.config, (config.batches, config.lengths), config.seed
    if DecodePart.KERNEL in config.only:
        yield from measure_decode_attention(config.heads, *sizes, config.densities, config.implementation, seed=seed)
    if DecodePart.LAYER in config.only:
        yield from measure_layer(model, *sizes, config.model_density, policies=config.policies, seed=seed)
    if DecodePart.MODEL in config.only:
        yield from new_tokens(config.shape, *sizes, config.model_density, config.tokens, seed=seed)


def new_tokens(
    shape: ModelShape, batches: Sequence[int], lengths: Sequence[int], density: float, tokens: int, *, seed: int = 0
) -> Iterator[Measurement]:
    """For each batch and length, the smallest cache first: dense, and at the density.

    Args:
      lengths: of each sequence after its last new token.
      tokens: new ones that are timed together.
    """
    model = random_model(shape.config, DecodeGateConfig(), seed=seed)
    for batch, length in sorted(itertools.product(batches, lengths), key=math.prod):
        dense = Baseline()
        for policy in (Dense(), TopK(density)):
            kept = policy.expected_density
            settings = dict(model=shape.value, batch=batch, length=length, density=kept, dtype=str(model.dtype))
            settings |= dict(tokens=min(tokens, length - 1))
            cache = abstract_cache(model.config, batch, length, model.dtype, _gate(model, policy))
            line = measure(
                NEW_TOKENS.name,
                f"{batch} x {length}, " + ("dense" if kept is None else f"{kept:g}"),
                settings,
                functools.partial(_new_tokens, model, policy, batch, length, settings["tokens"], dense, seed),
                needed_bytes=tree_bytes(model) + tree_bytes(cache),
            )
            if policy.is_dense:
                dense = Baseline(line.results.get("milliseconds"))
            yield line


def read_bytes(model: Transformer, batch: int, length: int, kept: float | None) -> float:
    """Bytes that a step must read: the weights once, and the cache's keys and values that are listed.

    Args:
      kept: share of the blocks that are listed, for which compressed keys and the gate's weights are read besides; None: the
        model is dense.
    """
    gate = None if kept is None or model.decode_gate is None else model.decode_gate.config
    cache = abstract_cache(model.config, batch, length, model.dtype, gate)
    read = tree_bytes((model.layers, model.norm, model.head))
    read += (1.0 if kept is None else kept) * tree_bytes(cache.token_arrays) + tree_bytes(cache.gate_key_arrays)
    return read if gate is None else read + tree_bytes(model.decode_gate)


def _gate(model: Transformer, policy: Policy) -> DecodeGateConfig | None:
    """The gate's part of the cache: None where the policy does not read it, as in `generate`."""
    return model.decode_gate.config if policy.needs_gate and model.decode_gate is not None else None


def _new_tokens(
    model: Transformer, policy: Policy, batch: int, length: int, steps: int, dense: Baseline, seed: int
) -> Outcome:
    Carried = tuple[Int[Array, "B"], Cache]

    def decode(carried: Carried, model: Transformer) -> tuple[Carried, tuple]:
        def step(_: Any, carry: tuple) -> tuple:
            tokens, cache, _, finite = carry
            logits, cache, kept = model.decode(tokens, cache, sparsity=policy)
            finite &= jnp.isfinite(logits).all()
            return logits.argmax(-1).astype(tokens.dtype), cache, kept, finite

        tokens, cache = carried
        cache = cache.with_lengths(jnp.full(batch, length - steps, jnp.int32))
        start = tokens, cache, jnp.zeros((model.config.num_layers, batch)), jnp.array(True)
        tokens, cache, *outputs = jax.lax.fori_loop(0, steps, step, start)
        return (tokens, cache), tuple(outputs)

    gate = _gate(model, policy)
    cache = random_cache(model.config, batch, length, model.dtype, gate, seed=seed)
    program = run_program(decode, (jnp.arange(batch, dtype=jnp.int32), cache), model)
    timing, (kept, finite) = program.timing.divided(steps), program.outputs
    density = float(kept.mean())
    results = {
        "density": density,
        **timing.results,
        "tokens_per_second": batch / timing.milliseconds * 1e3,
        **floor_results(timing.milliseconds, read_bytes(model, batch, length, None if gate is None else density)),
        **program.results,
        "speedup": 1.0 if policy.is_dense else dense.over(timing.milliseconds),
    }
    return Outcome(results, program.note, None if bool(finite) else "the logits are not finite")


def _rule(m: Measurement) -> str:
    """How blocks are chosen, the same at every length."""
    rule = m.settings.get("rule") or "top"
    return f"{rule.split()[0]} {m.settings['density']:.0%}"


PANELS = tuple(
    Panel(
        title,
        table.name,
        colour=lambda m: f"batch {m.settings['batch']}",
        style=_rule,
        y_label="times faster than dense",
        shown=lambda m: m.settings["density"] is not None,
    )
    for title, table in (
        ("attention kernel", DECODE_ATTENTION),
        ("one layer's attention", DECODE_LAYER),
        ("whole model", NEW_TOKENS),
    )
)

"""`seer-jax bench decode`: new tokens against a long cache, from the attention kernel to the whole model."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import default_device
from seer_jax.bench.configs import DecodeBench, gate_settings
from seer_jax.bench.decode_attention import DECODE_ATTENTION, measure_decode_attention
from seer_jax.bench.decode_layer import DECODE_LAYER, measure_layer
from seer_jax.bench.harness.clock import floor_results, memory_rate
from seer_jax.bench.harness.measurement import Measurement, Outcome, beside_dense, measure, run_program
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import FLOOR, LISTED, MEMORY, MILLISECONDS, PROGRAM, SPEEDUP, Column, Table, report
from seer_jax.bench.models import abstract_cache, random_cache, random_model, read_bytes
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK

RATE = Column("tokens/s", "tokens_per_second", ".4g", "new tokens of all sequences")
NEW_TOKENS = Table(
    "decode model",
    "Whole model, one new token of each sequence",
    (LISTED, MILLISECONDS, RATE, *FLOOR, SPEEDUP, *PROGRAM, MEMORY),
)


def bench_decode(config: DecodeBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_decode(config), (DECODE_ATTENTION, DECODE_LAYER, NEW_TOKENS), PANELS)


def measure_decode(config: DecodeBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    memory_rate(default_device())  # while there is memory for it
    if "kernel" in config.only:
        yield from measure_decode_attention(config)
    if "layer" in config.only:
        yield from measure_layer(config)
    if "model" in config.only:
        yield from new_tokens(config)


def new_tokens(config: DecodeBench) -> Iterator[Measurement]:
    """For each batch and length, the smallest cache first: dense, and at the density. The last new token fills the cache."""
    model = random_model(config.model, config.gate, seed=config.seed)

    def line(batch: int, length: int, policy: Policy) -> Measurement:
        # Without a policy that reads it there is no gate's part of the cache, as in `generate`.
        shape = batch, length, model.dtype, config.gate if policy.needs_gate else None

        def decode(carried: tuple, model: Transformer) -> tuple[tuple, tuple]:
            def step(_: Any, carry: tuple) -> tuple:
                tokens, cache, _, finite = carry
                logits, cache, kept = model.decode(tokens, cache, sparsity=policy)
                finite &= jnp.isfinite(logits).all()
                return logits.argmax(-1).astype(tokens.dtype), cache, kept, finite

            tokens, cache = carried
            cache = cache.with_lengths(jnp.full(batch, length - config.tokens, jnp.int32))
            start = tokens, cache, jnp.zeros((model.config.num_layers, batch)), jnp.array(True)
            tokens, cache, kept, finite = jax.lax.fori_loop(0, config.tokens, step, start)
            return (tokens, cache), (kept, finite)

        def run() -> Outcome:
            cache = random_cache(model.config, *shape, seed=config.seed)
            program = run_program(decode, (jnp.arange(batch, dtype=jnp.int32), cache), model)
            timing, (kept, finite) = program.timing.divided(config.tokens), program.outputs
            read = weight_bytes(model) + read_bytes(model.config, *shape, float(kept.mean()))
            results = dict(density=float(kept.mean()), tokens_per_second=batch / timing.milliseconds * 1e3)
            results |= timing._asdict() | floor_results(timing.milliseconds, read) | program.results
            return Outcome(results, program.note, None if bool(finite) else "logits not finite")

        kept = policy.expected_density
        settings = dict(model=config.shape.value, batch=batch, length=length, density=kept, dtype=str(model.dtype))
        settings |= dict(tokens=config.tokens) | gate_settings(config.gate)
        needed = tree_bytes((model, abstract_cache(model.config, *shape)))
        case = f"{batch} x {length}, " + ("dense" if kept is None else f"{kept:g}")
        return measure(NEW_TOKENS.name, case, settings, run, needed_bytes=needed)

    policies, sizes = (Dense(), TopK(config.model_density)), itertools.product(config.batches, config.lengths)
    yield from beside_dense(line(*size, policy) for size in sorted(sizes, key=math.prod) for policy in policies)


def weight_bytes(model: Transformer) -> int:
    """Bytes of the base weights that a new token must read."""
    return tree_bytes((model.layers, model.norm, model.head))


def _rule(m: Measurement) -> str:
    """How blocks are chosen, the same at every length."""
    return f"{(m.settings.get('rule') or 'top').split()[0]} {m.settings['density']:.0%}"


PANELS = [
    Panel(title, table.name, colour=lambda m: f"batch {m.settings['batch']}", style=_rule)
    for title, table in (
        ("attention kernel", DECODE_ATTENTION),
        ("one layer's attention", DECODE_LAYER),
        ("whole model", NEW_TOKENS),
    )
]

"""Whole models with random weights: time per new token, beside the time that reading weights and cache takes."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bench import Measurement, floor_results, guarded, time_calls, too_large
from seer_jax.bench.models import (
    CONFIGS,
    Shape,
    abstract_cache,
    memory_results,
    peak_bytes,
    random_cache,
    random_model,
)
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TopK


def new_tokens(
    shape: Shape, batches: Sequence[int], lengths: Sequence[int], density: float, tokens: int, *, seed: int = 0
) -> Iterator[Measurement]:
    """For each batch and length, the smallest cache first: dense, and at the density.

    Args:
      lengths: of each sequence after its last new token.
      tokens: new ones that are timed together.
    """
    model = random_model(CONFIGS[shape], gates=(DecodeGateConfig(),), seed=seed)
    for batch, length in sorted(itertools.product(batches, lengths), key=math.prod):
        for policy in (Dense(), TopK(density)):
            share = policy.density if isinstance(policy, TopK) else None
            settings = dict(model=shape.value, batch=batch, length=length, density=share, dtype=str(model.dtype))
            name = f"{batch} x {length}, " + ("dense" if share is None else f"{share:g}")
            blank = Measurement("decode model", name, settings | dict(tokens=min(tokens, length - 1)))
            cache = abstract_cache(model.config, batch, length, model.dtype, _gate(model, policy))
            note = too_large(tree_bytes(model) + tree_bytes(cache))
            if note is not None:
                yield dataclasses.replace(blank, note=f"{batch} x {length} {note}")
                continue
            yield guarded(functools.partial(_new_tokens, model, policy, seed, blank), blank, must_fit=False)


def read_bytes(model: Transformer, batch: int, length: int, kept: float | None) -> float:
    """What a step must read: the weights once, and the cache's keys and values that are listed.

    Args:
      kept: share of the blocks that are listed, for which compressed keys and the gate's weights are read besides; None: the
        model is dense.
    """
    gate = None if kept is None or model.decode_gate is None else model.decode_gate.config
    cache = abstract_cache(model.config, batch, length, model.dtype, gate)
    read = tree_bytes((model.layers, model.norm, model.head))
    read += (1.0 if kept is None else kept) * tree_bytes((cache.keys, cache.values))
    return read if gate is None else read + tree_bytes((cache.gate.keys, model.decode_gate))


def _gate(model: Transformer, policy: Dense | TopK) -> DecodeGateConfig | None:
    """Of the cache: None where nobody reads it, as in `generate`."""
    return None if isinstance(policy, Dense) or model.decode_gate is None else model.decode_gate.config


def _new_tokens(model: Transformer, policy: Dense | TopK, seed: int, blank: Measurement) -> Measurement:
    batch, length, steps = (blank.settings[name] for name in ("batch", "length", "tokens"))

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(
        model: Transformer, tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Int[Array, "B"], Cache, Float[Array, "L B"], Bool[Array, ""]]:
        def step(_: Any, carry: tuple) -> tuple:
            tokens, cache, _, finite = carry
            logits, cache, kept = model.decode(tokens, cache, sparsity=policy)
            finite &= jnp.isfinite(logits).all()
            return logits.argmax(-1).astype(tokens.dtype), cache, kept, finite

        cache = dataclasses.replace(cache, lengths=jnp.full(batch, length - steps, jnp.int32))
        start = tokens, cache, jnp.zeros((model.config.num_layers, batch)), jnp.array(True)
        return jax.lax.fori_loop(0, steps, step, start)

    gate = _gate(model, policy)
    latest: list[Any] = [jnp.arange(batch, dtype=jnp.int32), None, None, None]
    latest[1] = random_cache(model.config, batch, length, model.dtype, gate, seed=seed)
    before = peak_bytes() or 0
    start = time.perf_counter()
    compiled = decode.lower(model, *latest[:2]).compile()
    seconds = time.perf_counter() - start

    def run() -> Int[Array, "B"]:
        latest[:] = compiled(model, *latest[:2])  # each run gives the cache to the next one
        return latest[0]

    timing = time_calls(run).divided(steps)
    _, _, kept, finite = latest
    density = float(kept.mean())
    memory, note = memory_results(compiled, before)
    results = {
        "density": density,
        "milliseconds": timing.milliseconds,
        "spread": timing.spread,
        "tokens_per_second": batch / timing.milliseconds * 1e3,
        **floor_results(timing.milliseconds, read_bytes(model, batch, length, None if gate is None else density)),
        "compile_seconds": seconds,
        **memory,
    }
    fault = None if bool(finite) else "the logits are not finite"
    return dataclasses.replace(blank, results=results, failure=fault, note=note)

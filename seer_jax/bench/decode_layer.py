"""One layer's attention of new tokens, timed as the model does it: from queries, keys and values to the output."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from seer_jax.bench.configs import DecodeBench, gate_settings
from seer_jax.bench.harness import clock
from seer_jax.bench.harness.measurement import Measurement, Outcome, beside_dense, measure, not_finite
from seer_jax.bench.harness.report import FLOOR, LISTED, MEMORY, MILLISECONDS, SPEEDUP, Table
from seer_jax.bench.models import abstract_cache, random_cache, read_bytes
from seer_jax.bench.selection import LOGITS_SPREAD
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.attention import decode_attention
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.rope import rotate
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import Threshold, TopK

TITLE = "Attention of one layer with gate and cache, new tokens"
DECODE_LAYER = Table("decode layer", TITLE, (LISTED, MILLISECONDS, *FLOOR, SPEEDUP, MEMORY))
DTYPE = jnp.bfloat16
LAYER_SECONDS = 5e-5  # about what a layer takes besides reading
UPDATE_SECONDS = 5e-5  # about what the gate takes to take in a token's keys
ROWS_DRAWN = 256


def measure_layer(config: DecodeBench) -> Iterator[Measurement]:
    """For each batch and length: dense, then each policy."""
    density = config.model_density
    update = functools.cache(functools.partial(update_milliseconds, config.model, config.gate, seed=config.seed))
    for batch, length in itertools.product(config.batches, config.lengths):
        level = threshold_for(density, -(-length // config.gate.block_size))
        rules = config.rules() or {f"top {density:g}": TopK(density), f"threshold {level:.2g}": Threshold(level)}
        policies = {"dense": Dense(), **rules}.items()
        yield from beside_dense(_line(config, batch, length, rule, policy, update) for rule, policy in policies)


def threshold_for(density: float, num_blocks: int) -> float:
    """What a share `density` of the scores after softmax exceeds, for logits that spread as a trained gate's do."""
    logits = LOGITS_SPREAD * np.random.default_rng(0).standard_normal((ROWS_DRAWN, num_blocks))
    weights = np.exp(logits)
    return float(np.quantile(weights / weights.sum(1, keepdims=True), 1 - density))


def update_milliseconds(model: ModelConfig, config: DecodeGateConfig, batch: int, *, seed: int = 0) -> float:
    """A layer's share of the time in which the gate takes in a token's keys, all layers at once; here each completes a block
    and the pool at its end."""
    gate = DecodeGate(config, model, rngs=nnx.Rngs(seed))
    cache = random_cache(
        model, batch, config.block_size, DTYPE, config, seed=seed
    )  # it takes no longer in a longer one
    k = jax.random.normal(jax.random.key(seed), (model.num_layers, batch, model.num_kv_heads, model.head_dim), DTYPE)
    rounds = clock.rounds_of(1, UPDATE_SECONDS)

    @jax.jit
    def program(gate: DecodeGate, cache: Cache, k: Array) -> list[Array]:
        def once(_: Any, cache: Cache) -> Cache:
            return cache.finish_step(gate, k).with_lengths(cache.lengths)

        return jax.lax.fori_loop(0, rounds, once, cache).gate_arrays

    return clock.time_calls(program, gate, cache, k).milliseconds / rounds / model.num_layers


def _line(
    config: DecodeBench, batch: int, length: int, rule: str, policy: Policy, update: Callable[[int], float]
) -> Measurement:
    """One line; `update` gives a layer's share of the gate's update for a number of sequences, in milliseconds."""
    # Without one there is no part of the cache for it, as in `generate`.
    gate_config = config.gate if policy.needs_gate else None
    expected = 1.0 if policy.is_dense else policy.expected_density or config.model_density
    single = dataclasses.replace(config.model, num_layers=1)
    read = functools.partial(read_bytes, single, batch, length, DTYPE, gate_config)
    layers = clock.layers_beyond_cache(read(expected), read(1.0))
    stacked = dataclasses.replace(config.model, num_layers=layers)
    settings = dict(batch=batch, length=length, rule=rule, density=None if policy.is_dense else expected)
    settings |= dict(layers=layers, dtype=str(jnp.dtype(DTYPE))) | gate_settings(config.gate)

    def run() -> Outcome:
        gate = None if gate_config is None else DecodeGate(gate_config, stacked, rngs=nnx.Rngs(config.seed))
        rounds = clock.rounds_of(layers, clock.read_seconds(read(expected)) + LAYER_SECONDS)
        q = jax.random.normal(jax.random.key(config.seed), (batch, 1, stacked.num_heads, stacked.head_dim), DTYPE)
        cache = random_cache(stacked, batch, length, DTYPE, gate_config, gate_scale=LOGITS_SPREAD, seed=config.seed)
        timing, (out, kept) = clock.time_carried(repeated_layers(stacked, policy, rounds), cache, q, gate)
        share, density = 0.0 if gate is None else update(batch), float(kept.mean())
        milliseconds = timing.milliseconds / (rounds * layers) + share
        results = dict(density=density, milliseconds=milliseconds, spread=timing.spread, update_milliseconds=share)
        return Outcome(results | clock.floor_results(milliseconds, read(density)), failure=not_finite(output=out))

    needed = tree_bytes(abstract_cache(stacked, batch, length, DTYPE, gate_config))
    return measure(DECODE_LAYER.name, f"{batch} x {length}, {rule}", settings, run, needed_bytes=needed)


def repeated_layers(
    model: ModelConfig, policy: Policy, rounds: int
) -> Callable[..., tuple[Cache, tuple[Array, Array]]]:
    """A program of (cache, queries, gate) that runs all layers, each as `Transformer.decode` does it, `rounds` times over; all but
    what comes after the last layer, see `update_milliseconds`.

    The next layer's queries, keys and values are of this one's output. The lengths stay as they are: each round appends to the
    same slots. Returns (cache, (output, share of the blocks that each layer and row kept)).
    """

    def layer(carry: tuple[Array, Array, Cache], gate: DecodeGate | None) -> tuple[tuple[Array, Array, Cache], Array]:
        index, q, cache = carry
        k, v = q[:, :, : model.num_kv_heads], q[:, :, -model.num_kv_heads :]
        q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], model.rope)
        cache = cache.append(index, k_rotated[:, 0], v[:, 0])
        view, block_size = cache.view(index), policy.tokens_per_block(gate)
        context = DecodeContext(q=q, q_rotated=q_rotated, cache=view, layer=index, block_size=block_size, gate=gate)
        out, kept = decode_attention(policy, context)
        return (index + 1, out, cache), kept

    @functools.partial(jax.jit, donate_argnums=0)
    def program(cache: Cache, q: Array, gate: DecodeGate | None) -> tuple[Cache, tuple[Array, Array]]:
        def once(_: Any, carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
            (_, q, cache), kept = jax.lax.scan(layer, (jnp.int32(0), *carry[:2]), gate, model.num_layers)
            return q, cache, kept

        start = q, cache, jnp.zeros((model.num_layers, len(q)))
        q, cache, kept = jax.lax.fori_loop(0, rounds, once, start)
        return cache, (q, kept)

    return program

"""One layer's attention of new tokens, timed as the model does it: from queries, keys and values to the output."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.bench import (
    Measurement,
    Timing,
    floor_results,
    guarded,
    layers_beyond_cache,
    memory_rate,
    rounds_of,
    time_calls,
    too_large,
)
from seer_jax.bench.models import abstract_cache, random_cache
from seer_jax.bench.selection import LOGITS_SPREAD
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.attention import decode_attention
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.rope import rotate
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import Threshold, TopK

GATE = DecodeGateConfig()
DTYPE = jnp.bfloat16
LAYER_SECONDS = 5e-5  # about what a layer takes besides reading
UPDATE_SECONDS = 5e-5  # about what the gate takes to take in a token's keys
ROWS_DRAWN = 256


@dataclasses.dataclass(frozen=True)
class Step:
    """Of one layer, for the newest token of each sequence.

    Attributes:
      config: heads and RoPE.
      policy: which blocks are kept.
      batch: B.
      length: tokens of each sequence, the newest included.
    """

    config: ModelConfig
    policy: Dense | TopK | Threshold
    batch: int
    length: int

    @property
    def gate(self) -> DecodeGateConfig | None:
        """None where nobody reads its part of the cache, as in `generate`."""
        return None if isinstance(self.policy, Dense) else GATE

    def read_bytes(self, kept: float) -> float:
        """Of a layer's cache and gate.

        Args:
          kept: share of the blocks that are listed.
        """
        one = dataclasses.replace(self.config, num_layers=1)
        cache = abstract_cache(one, self.batch, self.length, DTYPE, self.gate)
        read = kept * tree_bytes((cache.keys, cache.values))
        if self.gate is not None:
            read += tree_bytes((cache.gate.keys, nnx.eval_shape(lambda: DecodeGate(GATE, one, rngs=nnx.Rngs(0)))))
        return read

    def stacked(self, kept: float) -> ModelConfig:
        """As `config`, with so many layers that none finds in the L2 cache what it reads."""
        layers = layers_beyond_cache(self.read_bytes(kept), self.read_bytes(1.0))
        return dataclasses.replace(self.config, num_layers=layers)


def measure_layer(
    config: ModelConfig, batches: Sequence[int], lengths: Sequence[int], density: float, *, seed: int = 0
) -> Iterator[Measurement]:
    """For each batch and length: dense, by top-k, and by a threshold that keeps about as much."""

    @functools.cache
    def update(batch: int) -> float:
        return gate_update(config, batch, seed=seed).milliseconds / config.num_layers

    for batch, length in itertools.product(batches, lengths):
        level = threshold_for(density, -(-length // GATE.block_size))
        rules = {"dense": Dense(), f"top {density:g}": TopK(density), f"threshold {level:.2g}": Threshold(level)}
        for rule, policy in rules.items():
            step = Step(config, policy, batch, length)
            stacked = step.stacked(1.0 if isinstance(policy, Dense) else density)
            settings = dict(batch=batch, length=length, rule=rule, density=None if rule == "dense" else density)
            settings |= dict(layers=stacked.num_layers, dtype=str(jnp.dtype(DTYPE)))
            blank = Measurement("decode layer", f"{batch} x {length}, {rule}", settings)
            note = too_large(tree_bytes(abstract_cache(stacked, batch, length, DTYPE, step.gate)))
            if note is not None:
                yield dataclasses.replace(blank, note=f"{batch} x {length} {note}")
                continue
            yield guarded(functools.partial(_measure, step, stacked, update, seed, blank), blank, must_fit=False)


def threshold_for(density: float, num_blocks: int) -> float:
    """What a share `density` of the scores after softmax exceeds, for logits that spread as a trained gate's do."""
    logits = LOGITS_SPREAD * np.random.default_rng(0).standard_normal((ROWS_DRAWN, num_blocks))
    weights = np.exp(logits)
    return float(np.quantile(weights / weights.sum(1, keepdims=True), 1 - density))


def repeated_layers(step: Step, rounds: int) -> Callable[..., tuple[Array, Cache, Array]]:
    """A program of (queries, cache, gate) that runs all layers, each as `Transformer.decode` does it, `rounds` times over; all but
    what comes after the last layer, see `gate_update`.

    The next layer's queries, keys and values are of this one's output. The lengths stay as they are: each round appends to the
    same slots. Returns (output, cache, share of the blocks that each layer and row kept).
    """
    config = step.config

    def layer(carry: tuple[Array, Array, Cache], gate: DecodeGate | None) -> tuple[tuple[Array, Array, Cache], Array]:
        index, q, cache = carry
        k, v = q[:, :, : config.num_kv_heads], q[:, :, -config.num_kv_heads :]
        q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], config)
        cache = cache.append(index, k_rotated[:, 0], v[:, 0])
        out, kept = decode_attention(step.policy, gate, index, q, q_rotated, cache)
        return (index + 1, out, cache), kept

    @functools.partial(jax.jit, donate_argnums=1)
    def program(q: Array, cache: Cache, gate: DecodeGate | None) -> tuple[Array, Cache, Array]:
        layers = len(cache.keys)

        def once(_: Any, carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
            (_, q, cache), kept = jax.lax.scan(layer, (jnp.int32(0), *carry[:2]), gate, layers)
            return q, cache, kept

        return jax.lax.fori_loop(0, rounds, once, (q, cache, jnp.zeros((layers, step.batch))))

    return program


def gate_update(config: ModelConfig, batch: int, *, seed: int = 0) -> Timing:
    """Time in which the gate takes in a token's keys, of all layers of the model at once; here each completes a block."""
    gate = DecodeGate(GATE, config, rngs=nnx.Rngs(seed))
    cache = random_cache(config, batch, GATE.block_size, DTYPE, GATE, seed=seed)  # it takes no longer in a longer one
    k = jax.random.normal(jax.random.key(seed), (config.num_layers, batch, config.num_kv_heads, config.head_dim), DTYPE)
    rounds = rounds_of(1, UPDATE_SECONDS)

    @jax.jit
    def program(gate: DecodeGate, cache: Cache, k: Array) -> GateCache | None:
        return jax.lax.fori_loop(0, rounds, lambda _, cache: cache.append_gate(gate, k), cache).gate

    return time_calls(program, gate, cache, k).divided(rounds)


def _measure(
    step: Step, stacked: ModelConfig, update: Callable[[int], float], seed: int, blank: Measurement
) -> Measurement:
    """One line; `update` gives a layer's share of `gate_update` for so many sequences, in milliseconds."""
    layers, read = stacked.num_layers, step.read_bytes(blank.settings["density"] or 1.0)
    gate = None if step.gate is None else DecodeGate(step.gate, stacked, rngs=nnx.Rngs(seed))
    rounds = rounds_of(layers, read / memory_rate() + LAYER_SECONDS)
    program = repeated_layers(step, rounds)
    q = jax.random.normal(jax.random.key(seed), (step.batch, 1, step.config.num_heads, step.config.head_dim), DTYPE)
    latest: list[Any] = [None, None, None]
    latest[1] = random_cache(stacked, step.batch, step.length, DTYPE, step.gate, gate_scale=LOGITS_SPREAD, seed=seed)

    def run() -> Float[Array, "B 1 H D"]:
        latest[:] = program(q, latest[1], gate)  # each run gives the cache to the next one
        return latest[0]

    timing = time_calls(run).divided(rounds * layers)
    share = 0.0 if gate is None else update(step.batch)
    milliseconds, kept = timing.milliseconds + share, float(latest[2].mean())
    results = {
        "density": kept,
        "milliseconds": milliseconds,
        "spread": timing.spread,
        "update_milliseconds": share,
        **floor_results(milliseconds, step.read_bytes(kept)),
    }
    fault = None if bool(jnp.isfinite(latest[0]).all()) else "the output is not finite"
    return dataclasses.replace(blank, results=results, failure=fault)

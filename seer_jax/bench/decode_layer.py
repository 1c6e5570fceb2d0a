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
from jaxtyping import Array

from seer_jax.bench.harness.baseline import Baseline
from seer_jax.bench.harness.clock import (
    Timing,
    floor_results,
    layers_beyond_cache,
    read_seconds,
    rounds_of,
    time_calls,
    time_carried,
)
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure
from seer_jax.bench.harness.tables import FLOOR, LISTED, MEMORY, MILLISECONDS, SPEEDUP, Table
from seer_jax.bench.models import abstract_cache, random_cache
from seer_jax.bench.selection import LOGITS_SPREAD, parse_rules
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

DECODE_LAYER = Table(
    "decode layer",
    "Attention of one layer with gate and cache, new tokens",
    (LISTED, MILLISECONDS, *FLOOR, SPEEDUP, MEMORY),
)
GATE = DecodeGateConfig()
DTYPE = jnp.bfloat16
LAYER_SECONDS = 5e-5  # about what a layer takes besides reading
UPDATE_SECONDS = 5e-5  # about what the gate takes to take in a token's keys
ROWS_DRAWN = 256


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """The newest token of each sequence in one layer.

    Attributes:
      config: heads and RoPE.
      policy: which blocks are kept.
      batch: B.
      length: tokens of each sequence, the newest included.
      density: share of the blocks that the policy is expected to keep.
    """

    config: ModelConfig
    policy: Policy
    batch: int
    length: int
    density: float = 1.0

    @property
    def gate(self) -> DecodeGateConfig | None:
        """None where the policy needs none: its part of the cache is not there then, as in `generate`."""
        return GATE if self.policy.needs_gate else None

    def read_bytes(self, kept: float) -> float:
        """Bytes that must be read of a layer's cache and gate.

        Args:
          kept: share of the blocks that are listed.
        """
        one = dataclasses.replace(self.config, num_layers=1)
        cache = abstract_cache(one, self.batch, self.length, DTYPE, self.gate)
        read = kept * tree_bytes(cache.token_arrays) + tree_bytes(cache.gate_key_arrays)
        return read if self.gate is None else read + tree_bytes(nnx.eval_shape(lambda: _gate(self.gate, one)))

    @property
    def stacked(self) -> ModelConfig:
        """As `config`, with so many layers that none finds in the L2 cache what it reads."""
        layers = layers_beyond_cache(self.read_bytes(self.density), self.read_bytes(1.0))
        return dataclasses.replace(self.config, num_layers=layers)


def measure_layer(
    config: ModelConfig,
    batches: Sequence[int],
    lengths: Sequence[int],
    density: float,
    *,
    policies: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Measurement]:
    """For each batch and length: dense, then each policy.

    Args:
      density: share of the blocks that top-k and the threshold keep.
      policies: as on a command line; none: top-k and a threshold of a gate.
    """

    @functools.cache
    def update(batch: int) -> float:
        return gate_update(config, batch, seed=seed).milliseconds / config.num_layers

    rules = parse_rules(policies)
    for batch, length in itertools.product(batches, lengths):
        level = threshold_for(density, -(-length // GATE.block_size))
        default = {f"top {density:g}": TopK(density), f"threshold {level:.2g}": Threshold(level)}
        dense = Baseline()
        for rule, policy in {"dense": Dense(), **(rules or default)}.items():
            kept = 1.0 if policy.is_dense else policy.expected_density or density
            step = LayerStep(config, policy, batch, length, kept)
            settings = dict(batch=batch, length=length, rule=rule, density=None if policy.is_dense else kept)
            settings |= dict(layers=step.stacked.num_layers, dtype=str(jnp.dtype(DTYPE)))
            line = measure(
                DECODE_LAYER.name,
                f"{batch} x {length}, {rule}",
                settings,
                functools.partial(_time, step, update, dense, seed),
                needed_bytes=tree_bytes(abstract_cache(step.stacked, batch, length, DTYPE, step.gate)),
            )
            if policy.is_dense:
                dense = Baseline(line.results.get("milliseconds"))
            yield line


def threshold_for(density: float, num_blocks: int) -> float:
    """What a share `density` of the scores after softmax exceeds, for logits that spread as a trained gate's do."""
    logits = LOGITS_SPREAD * np.random.default_rng(0).standard_normal((ROWS_DRAWN, num_blocks))
    weights = np.exp(logits)
    return float(np.quantile(weights / weights.sum(1, keepdims=True), 1 - density))


def repeated_layers(step: LayerStep, rounds: int) -> Callable[..., tuple[Cache, tuple[Array, Array]]]:
    """A program of (cache, queries, gate) that runs all layers, each as `Transformer.decode` does it, `rounds` times over; all but
    what comes after the last layer, see `gate_update`.

    The next layer's queries, keys and values are of this one's output. The lengths stay as they are: each round appends to the
    same slots. Returns (cache, (output, share of the blocks that each layer and row kept)).
    """
    config = step.config
    block_size = step.policy.tokens_per_block(None) if step.gate is None else step.gate.block_size

    def layer(carry: tuple[Array, Array, Cache], gate: DecodeGate | None) -> tuple[tuple[Array, Array, Cache], Array]:
        index, q, cache = carry
        k, v = q[:, :, : config.num_kv_heads], q[:, :, -config.num_kv_heads :]
        q_rotated, k_rotated = rotate(q, k, cache.lengths[:, None], config.rope)
        cache = cache.append(index, k_rotated[:, 0], v[:, 0])
        context = DecodeContext(
            q=q, q_rotated=q_rotated, cache=cache.view(index), layer=index, block_size=block_size, gate=gate
        )
        out, kept = decode_attention(step.policy, context)
        return (index + 1, out, cache), kept

    @functools.partial(jax.jit, donate_argnums=0)
    def program(cache: Cache, q: Array, gate: DecodeGate | None) -> tuple[Cache, tuple[Array, Array]]:
        layers = cache.num_layers

        def once(_: Any, carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
            (_, q, cache), kept = jax.lax.scan(layer, (jnp.int32(0), *carry[:2]), gate, layers)
            return q, cache, kept

        q, cache, kept = jax.lax.fori_loop(0, rounds, once, (q, cache, jnp.zeros((layers, step.batch))))
        return cache, (q, kept)

    return program


def gate_update(config: ModelConfig, batch: int, *, seed: int = 0) -> Timing:
    """Time in which the gate takes in a token's keys, of all layers of the model at once; here each completes a block."""
    cache = random_cache(config, batch, GATE.block_size, DTYPE, GATE, seed=seed)  # it takes no longer in a longer one
    k = jax.random.normal(jax.random.key(seed), (config.num_layers, batch, config.num_kv_heads, config.head_dim), DTYPE)
    rounds = rounds_of(1, UPDATE_SECONDS)

    @jax.jit
    def program(gate: DecodeGate, cache: Cache, k: Array) -> list[Array]:
        def once(_: Any, cache: Cache) -> Cache:
            return cache.finish_step(gate, k).with_lengths(cache.lengths)

        return jax.lax.fori_loop(0, rounds, once, cache).gate_arrays

    return time_calls(program, _gate(GATE, config, seed), cache, k).divided(rounds)


def _gate(gate: DecodeGateConfig, config: ModelConfig, seed: int = 0) -> DecodeGate:
    return DecodeGate(gate, config, rngs=nnx.Rngs(seed))


def _time(step: LayerStep, update: Callable[[int], float], dense: Baseline, seed: int) -> Outcome:
    """One line.

    Args:
      update: a layer's share of `gate_update` for that many sequences, in milliseconds.
      dense: the line of dense attention; without a time in that line itself.
    """
    stacked, layers = step.stacked, step.stacked.num_layers
    gate = None if step.gate is None else _gate(step.gate, stacked, seed)
    rounds = rounds_of(layers, read_seconds(step.read_bytes(step.density)) + LAYER_SECONDS)
    program = repeated_layers(step, rounds)
    q = jax.random.normal(jax.random.key(seed), (step.batch, 1, step.config.num_heads, step.config.head_dim), DTYPE)
    cache = random_cache(stacked, step.batch, step.length, DTYPE, step.gate, gate_scale=LOGITS_SPREAD, seed=seed)
    timing, (out, kept) = time_carried(program, cache, q, gate)
    timing = timing.divided(rounds * layers)
    share = 0.0 if gate is None else update(step.batch)
    milliseconds, kept = timing.milliseconds + share, float(kept.mean())
    results = {
        "density": kept,
        "milliseconds": milliseconds,
        "spread": timing.spread,
        "update_milliseconds": share,
        **floor_results(milliseconds, step.read_bytes(kept)),
        "speedup": 1.0 if step.policy.is_dense else dense.over(milliseconds),
    }
    return Outcome(results, failure=None if bool(jnp.isfinite(out).all()) else "the output is not finite")

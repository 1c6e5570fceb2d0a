"""The way from queries and keys to block lists, timed: the scores, the choice of blocks, and both together."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from pallas_kernels import BlockIndices
from seer_jax.bench.configs import BLOCK, PrefillBench, gate_settings
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure
from seer_jax.bench.harness.report import DENSITY, Column, Table
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import ModelConfig
from seer_jax.models.rope import rotate
from seer_jax.selection.context import PrefillContext
from seer_jax.selection.rules import CumulativeMass, RankingPolicy, Threshold, TopK
from seer_jax.selection.scorers import LearnedGate

SELECTION = Table(
    "selection",
    "Gate and choice of blocks, one layer",
    (
        DENSITY,
        Column(
            "gate\nms", "gate_milliseconds", ".4g", "pooling, projection and logits (of another scorer: its scores)"
        ),
        Column("choice\nms", "choice_milliseconds", ".4g", "from logits to lists"),
        Column("both\nms", "milliseconds", ".4g", "from queries and keys to lists, as the model does it"),
        Column("attention\nms", "attention_milliseconds", ".4g", "the kernel on random lists of that density"),
    ),
)
THRESHOLD = 5e-4
MASS = 0.9
LOGITS_SPREAD = 3.0  # standard deviation, as a trained gate's: thresholds keep few blocks then


def measure_selection(
    config: PrefillBench, attention: Mapping[tuple[int, float], float | None]
) -> Iterator[Measurement]:
    """One measurement for each length and policy.

    Args:
      attention: milliseconds of the attention kernel by length and density, to show beside.
    """
    model, density = config.model, config.model_density
    rules = config.rules() or {
        f"threshold {THRESHOLD:g}": Threshold(THRESHOLD),
        f"mass {MASS:g}": CumulativeMass(MASS),
        f"top {density:g}": TopK(density),
    }
    stacked = PrefillGate(config.gate, dataclasses.replace(model, num_layers=1), rngs=nnx.Rngs(config.seed))
    gate = jax.tree.map(lambda x: x[0], stacked)  # as the scan over layers hands it out
    for length, (rule, policy) in itertools.product(config.lengths, rules.items()):
        settings = dict(
            length=length, rule=rule, density=density, block_size=config.gate.block_size, heads=model.num_heads
        )
        settings |= gate_settings(config.gate)
        run = functools.partial(_time, config, gate, policy, length, attention.get((length, density)))
        yield measure(SELECTION.name, f"{length}, {rule}", settings, run)


def prefill_context(
    config: ModelConfig,
    gate: PrefillGate | None,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    *,
    block_size: int = BLOCK,
) -> PrefillContext:
    """What a policy may look at in the first layer of whole prompts without padding, whose values are the keys.

    `block_size` is that of the choice where there is no gate.

    Under jit nothing is rotated for scorers that look at queries and keys before RoPE alone.
    """
    q_rotated, k_rotated = rotate(q, k, jnp.arange(q.shape[1])[None], config.rope)
    return PrefillContext(
        q=q,
        k=k,
        q_rotated=q_rotated,
        k_rotated=k_rotated,
        v=k,
        lengths=jnp.full(len(q), q.shape[1], jnp.int32),
        layer=jnp.int32(0),
        block_size=block_size if gate is None else gate.config.block_size,
        gate=gate,
    )


@jax.jit
def _gate_logits(
    gate: PrefillGate, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]
) -> Float32[Array, "B H Tb Tb"]:
    positions = jnp.arange(q.shape[1])[None]
    return gate.logits(gate.queries(q, positions), gate.keys(k, positions))


def _time(
    config: PrefillBench, gate: PrefillGate, policy: RankingPolicy, length: int, attention: float | None
) -> Outcome:
    model, keys = config.model, jax.random.split(jax.random.key(config.seed))
    q = jax.random.normal(keys[0], (1, length, model.num_heads, model.head_dim), jnp.bfloat16)
    k = jax.random.normal(keys[1], (1, length, model.num_kv_heads, model.head_dim), jnp.bfloat16)
    logits = _gate_logits(gate, q, k)
    causal = jnp.tril(jnp.ones((1, 1, *logits.shape[2:]), bool))
    q = (q * (LOGITS_SPREAD / logits.std(where=causal))).astype(q.dtype)  # the logits grow with q
    del logits

    @jax.jit
    def score(gate: PrefillGate, q: Array, k: Array) -> Float32[Array, "B Hs Tb Tb"]:
        return policy.scorer.prefill_scores(policy.prepare(prefill_context(model, gate, q, k)))

    @jax.jit
    def choose(scores: Array) -> BlockIndices:
        zeros = (jnp.zeros(x.shape, x.dtype) for x in (q, k))  # a rule reads their shapes alone
        return policy.select(scores, prefill_context(model, None, *zeros, block_size=config.gate.block_size))

    @jax.jit
    def together(gate: PrefillGate, q: Array, k: Array) -> BlockIndices | None:
        return policy.blocks(policy.prepare(prefill_context(model, gate, q, k)))

    if isinstance(policy.scorer, LearnedGate):
        score = _gate_logits  # the gate alone: no mask of padding
    blocks = together(gate, q, k)
    density = float(blocks.density().mean())
    del blocks
    results = {
        "density": density,
        "gate_milliseconds": time_calls(score, gate, q, k).milliseconds,
        "choice_milliseconds": time_calls(choose, score(gate, q, k)).milliseconds,
        "milliseconds": time_calls(together, gate, q, k).milliseconds,
    }
    return Outcome({**results, "attention_milliseconds": attention})

"""The way from queries and keys to block lists, timed: the prefill gate, the choice of blocks, and both together."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import BlockIndices, select_blocks
from pallas_kernels.bench import Measurement, guarded, time_calls
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models import attention
from seer_jax.models.config import ModelConfig
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TopK

THRESHOLD = 5e-4
MASS = 0.9
LOGITS_SPREAD = 3.0  # standard deviation, as a trained gate's: thresholds keep few blocks then


def chosen_blocks(
    policy: Policy, gate: PrefillGate, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], config: ModelConfig
) -> BlockIndices:
    """The lists that `prefill_attention` hands to its kernel, which is left out."""
    lists: list[BlockIndices] = []

    def note(q: Any, k: Any, v: Any, blocks: BlockIndices, **_: Any) -> Any:
        lists.append(blocks)
        return q

    lengths = jnp.full(len(q), q.shape[1], jnp.int32)
    with mock.patch.object(attention, "block_sparse_attention", note):
        attention.prefill_attention(policy, gate, jnp.int32(0), q, k, k, lengths, config)
    return lists[0]


def measure_selection(
    config: ModelConfig, lengths: Sequence[int], density: float, *, seed: int = 0
) -> Iterator[Measurement]:
    """One measurement for each length and way to choose."""
    one_layer = dataclasses.replace(config, num_layers=1)
    stacked = PrefillGate(PrefillGateConfig(), one_layer, rngs=nnx.Rngs(seed))
    gate = jax.tree.map(lambda x: x[0], stacked)  # as the scan over layers hands it out
    for length in lengths:
        rules = {
            f"threshold {THRESHOLD:g}": Threshold(THRESHOLD),
            f"mass {MASS:g}": CumulativeMass(MASS),
            f"top {density:g}": TopK(density),
        }
        for rule, policy in rules.items():
            settings = dict(
                length=length, rule=rule, density=density, block_size=gate.config.block_size, heads=config.num_heads
            )
            blank = Measurement("selection", f"{length}, {rule}", settings)
            yield guarded(functools.partial(_measure, config, gate, policy, length, seed, blank), blank)


def _measure(
    config: ModelConfig,
    gate: PrefillGate,
    policy: Threshold | CumulativeMass | TopK,
    length: int,
    seed: int,
    blank: Measurement,
) -> Measurement:
    keys = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(keys[0], (1, length, config.num_heads, config.head_dim), jnp.bfloat16)
    k = jax.random.normal(keys[1], (1, length, config.num_kv_heads, config.head_dim), jnp.bfloat16)

    @jax.jit
    def score(gate: PrefillGate, q: Array, k: Array) -> Array:
        return gate.scores(q, k, jnp.arange(length)[None])

    @jax.jit
    def choose(logits: Array) -> BlockIndices:
        blocks = logits.shape[-1]
        keep, visible = jnp.eye(blocks, dtype=bool), jnp.arange(1, blocks + 1)[:, None]
        select = functools.partial(select_blocks, logits, block_size=gate.config.block_size, keep=keep, visible=visible)
        match policy:
            case Threshold():
                return select(threshold=policy.threshold)
            case CumulativeMass():
                return select(mass=policy.mass)
            case TopK():
                return select(top_k=policy.blocks(blocks))

    logits = score(gate, q, k)
    needed = jnp.tril(jnp.ones((1, 1, *logits.shape[2:]), bool))
    q = (q * (LOGITS_SPREAD / logits.std(where=needed))).astype(q.dtype)  # they grow with q
    del logits
    together = jax.jit(lambda gate, q, k: chosen_blocks(policy, gate, q, k, config))
    blocks = together(gate, q, k)
    results = {"density": float(blocks.density().mean())}
    del blocks
    results |= {
        "gate_milliseconds": time_calls(score, gate, q, k).milliseconds,
        "choice_milliseconds": time_calls(choose, score(gate, q, k)).milliseconds,
        "milliseconds": time_calls(together, gate, q, k).milliseconds,
    }
    return dataclasses.replace(blank, results=results)

"""Whole models and caches with random contents: time to first token and memory."""

import dataclasses
import enum
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.bench import GIB, Measurement, guarded, time_calls
from pallas_kernels.cases import Heads, large_random_array
from seer_jax.gates.configs import DecodeGateConfig, GateConfig, PrefillGateConfig
from seer_jax.inference.memory import laid_out_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK


class Shape(enum.StrEnum):
    """Model shapes to measure; tiny is for trying the command on a CPU."""

    LLAMA_3_1_8B = "llama-3.1-8b"
    TINY = "tiny"


CONFIGS = {
    Shape.LLAMA_3_1_8B: ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope=RopeConfig(theta=5e5, kind=RopeKind.LLAMA3, factor=8.0, original_max_position=8192),
        max_position_embeddings=131072,
    ),
    Shape.TINY: ModelConfig(
        family="llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    ),
}


def check_device(shape: Shape) -> None:
    """Raises ValueError for a shape that this device is too slow for."""
    if shape is not Shape.TINY and jax.default_backend() == "cpu":
        raise ValueError(f"The shape {shape.value} is for GPUs; on a CPU measure --shape {Shape.TINY.value}.")


def heads_of(config: ModelConfig) -> Heads:
    """H, K and D."""
    return Heads(config.num_heads, config.num_kv_heads, config.head_dim)


def random_model(
    config: ModelConfig, *, gates: Sequence[GateConfig] = (PrefillGateConfig(),), seed: int = 0
) -> Transformer:
    """A bfloat16 model with untrained gates, drawn on the device in little more memory than it takes.

    Weights are normal with variance 1 / fan-in.
    """
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    drawn = [
        jnp.ones(leaf.shape, leaf.dtype)
        if "norm" in jax.tree_util.keystr(path)
        else large_random_array(key, leaf.shape, leaf.dtype, leaf.shape[-1] ** -0.5)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    model = nnx.merge(graph, jax.tree.unflatten(structure, drawn))
    for gate in gates:
        model.add_gate(gate, rngs=nnx.Rngs(seed))
    return model


def random_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    gate: DecodeGateConfig | None,
    *,
    gate_scale: float = 1.0,
    seed: int = 0,
) -> Cache:
    """A cache of `capacity` - 1 random tokens a row, drawn on the device in little more memory than it takes.

    Args:
      gate_scale: standard deviation of the compressed keys, and so of the logits that a gate with norms gives.
    """
    abstract = abstract_cache(config, batch, capacity, dtype, gate)
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 4))

    def draw(leaf: jax.ShapeDtypeStruct, scale: float = 1.0) -> Float[Array, "..."]:
        return large_random_array(next(keys), leaf.shape, leaf.dtype, scale)

    drawn = (
        None if abstract.gate is None else GateCache(draw(abstract.gate.keys, gate_scale), draw(abstract.gate.pools))
    )
    return Cache(draw(abstract.keys), draw(abstract.values), jnp.full(batch, capacity - 1, jnp.int32), drawn)


def abstract_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, gate: DecodeGateConfig | None
) -> Any:
    """A `Cache` of shapes and dtypes."""
    return jax.eval_shape(lambda: Cache.create(config, batch, capacity, dtype, gate))


def first_token(
    shape: Shape, lengths: Sequence[int], densities: Sequence[float], *, seed: int = 0
) -> Iterator[Measurement]:
    """Time from a prompt's tokens to the logits after it, dense and at each density, the shortest prompts first."""
    model = random_model(CONFIGS[shape], seed=seed)
    for length in sorted(lengths):
        for policy in (Dense(), *map(TopK, sorted(densities))):
            density = policy.density if isinstance(policy, TopK) else None
            settings = dict(model=shape.value, length=length, density=density, dtype=str(model.dtype))
            name = f"{length}, " + ("dense" if density is None else f"{density:g}")
            blank = Measurement("model", name, settings)
            yield guarded(functools.partial(_first_token, model, length, policy, seed, blank), blank)


def _first_token(model: Transformer, length: int, policy: Policy, seed: int, blank: Measurement) -> Measurement:
    tokens = jax.random.randint(jax.random.key(seed), (1, length), 0, model.config.vocab_size)

    @functools.partial(jax.jit, donate_argnums=2)
    def prefill(model: Transformer, tokens: Int[Array, "B T"], cache: Cache) -> tuple:
        return model.prefill(tokens, None, cache, sparsity=policy)

    latest: list[Any] = [None, model.make_cache(1, length), None]
    before = peak_bytes() or 0
    start = time.perf_counter()
    compiled = prefill.lower(model, tokens, latest[1]).compile()
    seconds = time.perf_counter() - start

    def run() -> Float[Array, "B V"]:
        latest[:] = compiled(model, tokens, latest[1])  # each run gives the cache to the next one
        return latest[0]

    timing = time_calls(run)
    logits, _, kept = latest
    memory, note = memory_results(compiled, before)
    results = {
        "milliseconds": timing.milliseconds,
        "spread": timing.spread,
        "density": float(kept.mean()),
        "compile_seconds": seconds,
        **memory,
    }
    fault = None if bool(jnp.isfinite(logits).all()) else "the logits are not finite"
    return dataclasses.replace(blank, results=results, failure=fault, note=note)


def peak_bytes() -> int | None:
    """Most memory in use on the device so far, where it tells."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def memory_results(compiled: Any, before: int) -> tuple[dict[str, float | None], str | None]:
    """Results of a program that has run, and a note where the peak is not known.

    Args:
      compiled: the program.
      before: `peak_bytes` before it ran.
    """
    peak = peak_bytes()
    # The device remembers its highest peak alone: what needed more before hides this one.
    own = peak / GIB if peak and peak > before else None
    note = "peak memory: something before needed more" if peak and own is None else None
    return {"peak_gib": own, "planned_gib": planned_bytes(compiled) / GIB}, note


def planned_bytes(compiled: Any) -> int:
    """What the compiler lays out for one run: arguments, results that do not take an argument's place, and scratch."""
    return compiled.memory_analysis().argument_size_in_bytes + (laid_out_bytes(compiled) or 0)

"""Models and caches with random contents, drawn on the device in little more memory than they take."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.cases import large_random_array
from seer_jax.gates.configs import DecodeGateConfig, GateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer


def random_model(config: ModelConfig, *gates: GateConfig, seed: int = 0) -> Transformer:
    """A bfloat16 model with untrained gates, whose weights are normal with variance 1 / fan-in."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
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
    """A cache of `capacity` - 1 random tokens a row.

    Args:
      gate_scale: standard deviation of the compressed keys, and so of the logits that a gate with norms gives.
    """
    abstract = abstract_cache(config, batch, capacity, dtype, gate)
    scales = {id(leaf): gate_scale for leaf in abstract.gate_key_arrays}
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    drawn = {
        id(leaf): large_random_array(key, leaf.shape, leaf.dtype, scales.get(id(leaf), 1.0))
        for key, leaf in zip(keys, (*abstract.gate_arrays, *abstract.token_arrays), strict=False)
    }
    return jax.tree.map(lambda leaf: drawn.get(id(leaf), jnp.full(batch, capacity - 1, jnp.int32)), abstract)


def abstract_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, gate: DecodeGateConfig | None
) -> Any:
    """A `Cache` of shapes and dtypes."""
    return jax.eval_shape(lambda: Cache.create(config, batch, capacity, dtype, decode_gate=gate))


def read_bytes(
    config: ModelConfig, batch: int, length: int, dtype: DTypeLike, gate: DecodeGateConfig | None, kept: float
) -> float:
    """Bytes of cache and gate that a new token of each sequence must read in all layers.

    Args:
      kept: share of the blocks whose keys and values are read.
    """
    cache = abstract_cache(config, batch, length, dtype, gate)
    weights = None if gate is None else nnx.eval_shape(lambda: DecodeGate(gate, config, rngs=nnx.Rngs(0)))
    return kept * tree_bytes(cache.token_arrays) + tree_bytes((cache.gate_key_arrays, weights))

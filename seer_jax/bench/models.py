"""Models and caches with random contents, drawn on the device in little more memory than they take."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels.cases import large_random_array
from seer_jax.gates.configs import DecodeGateConfig, GateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.inference.memory import tree_bytes
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.on_mesh import cache_shardings


def random_model(config: ModelConfig, *gates: GateConfig, seed: int = 0, layout: Layout | None = None) -> Transformer:
    """A bfloat16 model with untrained gates, whose weights are normal with variance 1 / fan-in.

    Args:
      layout: of a mesh to spread it over; each weight is drawn on one device, the same ones as without a mesh, and then moved.
    """
    model = abstract_model(config)
    leaves, structure = weights_of(model)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))

    def draw(key: Any, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        norm = "norm" in path
        x = (
            jnp.ones(leaf.shape, leaf.dtype)
            if norm
            else large_random_array(key, leaf.shape, leaf.dtype, leaf.shape[-1] ** -0.5)
        )
        return x if layout is None else _moved(x, layout.sharding(path, x))

    model = jax.tree.unflatten(structure, [draw(key, *leaf) for key, leaf in zip(keys, leaves, strict=True)])
    for gate in gates:
        model.add_gate(gate, rngs=nnx.Rngs(seed))
    if layout is not None:
        model = layout.placed(model)
        model.layout = layout
    return model


def abstract_model(config: ModelConfig, *gates: GateConfig, dtype: DTypeLike = jnp.bfloat16) -> Transformer:
    """A model with gates, of shapes."""

    def build() -> Transformer:
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        for gate in gates:
            model.add_gate(gate, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(build)


def _moved(x: jax.Array, sharding: Any) -> jax.Array:
    """An array at its place, after which that of before is free."""
    return jax.block_until_ready(jax.device_put(x, sharding))


def random_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    gate: DecodeGateConfig | None,
    *,
    gate_scale: float = 1.0,
    seed: int = 0,
    layout: Layout | None = None,
) -> Cache:
    """A cache of `capacity` - 1 random tokens a row, the same ones on every mesh.

    Args:
      gate_scale: standard deviation of the compressed keys, and so of the logits that a gate with norms gives.
      layout: of a mesh to spread it over. One layer at a time is drawn on one device, which need not have room for all of them.
    """
    abstract = abstract_cache(config, batch, capacity, dtype, gate)
    leaves, structure = jax.tree.flatten(abstract)
    specs = {} if layout is None else dict(zip(map(id, leaves), cache_shardings(layout, abstract), strict=True))
    scales = {id(leaf): gate_scale for leaf in abstract.gate_key_arrays}
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    drawn = {}
    for key, leaf in zip(keys, (*abstract.gate_arrays, *abstract.token_arrays), strict=False):
        drawn[id(leaf)] = _layer_by_layer(key, leaf, scales.get(id(leaf), 1.0), specs.get(id(leaf)))
    made = [drawn.get(id(leaf), jnp.full(batch, capacity - 1, jnp.int32)) for leaf in leaves]
    return jax.tree.unflatten(structure, made)


def _layer_by_layer(key: Any, like: jax.ShapeDtypeStruct, scale: float, sharding: NamedSharding | None) -> jax.Array:
    """A normal array [L, ...]."""
    layers, *shape = like.shape
    x = jnp.zeros(like.shape, like.dtype, device=sharding)
    for number, of_layer in enumerate(jax.random.split(key, layers)):
        layer = large_random_array(of_layer, tuple(shape), like.dtype, scale)
        if sharding is not None:
            layer = _moved(layer, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])))
        x = _with_layer(x, layer, number)
    return x


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(x: jax.Array, layer: jax.Array, number: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, layer, number, 0)


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

"""Passes of a model that is spread over a mesh: each device runs the code of a single device on its part."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from seer_jax.models.cache import Cache
from seer_jax.selection.policies import Given
from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.shard import Shard
from seer_jax.sharding.table import HEADS, ROWS, TENSOR

P = PartitionSpec
OF_ROWS = P(ROWS)  # [B, ...]
OF_LAYERS_AND_ROWS = P(None, ROWS)  # [L, B]
OF_VOCABULARY = P(ROWS, None, TENSOR)  # [B, T, V]
NO_SHAPE = (0,) * 8  # of results: no name in their specs depends on a size

Results = tuple[PartitionSpec | tuple[PartitionSpec, ...] | type[Cache], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """An argument of `on_mesh` whose arrays are not split by rows alone; the function gets its value.

    Attributes:
      value: an array, or a pytree of arrays that are split alike.
      spec: how, in the names of `seer_jax.sharding.table`.
    """

    value: Any
    spec: PartitionSpec = dataclasses.field(metadata=dict(static=True))


def on_mesh(function: Callable[..., Any], results: Results, model: Any, segments: Any, *args: Any) -> Any:
    """function(model, segments, *args), computed by every device of the model's mesh on its part of all of them.

    Args:
      function: gets a model with the weights, the heads and the `config` of one device, whose `shard` exchanges with the others.
      results: how each of its results is split, in the names of `seer_jax.sharding.table`: an array or a pytree of arrays by one spec, a
        tuple by several; `Cache` for a cache like the one among `args`.
      model: with a `layout`.
      segments: layers under their policies, see `Transformer.segments`.
      *args: arrays [B, ...], whose rows are split, caches, and `Split`. The first one has the rows.
    """
    layout = model.layout
    rows = layout.rows(jax.tree.leaves(args[0])[0].shape[0])
    placed = []
    for x in args:
        leaves, structure = jax.tree.flatten(x)
        shardings = [NamedSharding(layout.mesh, spec) for spec in _specs(layout, rows, x)]
        placed.append(jax.tree.unflatten(structure, map(_placed, leaves, shardings)))
    return _run(function, results, rows, model, segments, tuple(placed))


@functools.partial(jax.jit, static_argnames=("function", "results", "rows"))
def _run(function: Callable, results: Results, rows: tuple[str, ...], model: Any, segments: Any, args: tuple) -> Any:
    layout = model.layout
    named, of_model = weights_of(model)
    paths, weights = zip(*named, strict=True)
    weight_specs = tuple(layout.weight_spec(path, x.shape) for path, x in named)
    policies, of_segments = jax.tree.flatten(segments)
    arrays, of_args = jax.tree.flatten(args)
    array_specs = [spec for x in args for spec in _specs(layout, rows, x)]
    cache = next((x for x in args if isinstance(x, Cache)), None)

    def part(weights: tuple, policies: list, arrays: list) -> list[Any]:
        local = Shard(layout, rows).model(of_model, list(zip(paths, weights, strict=True)))
        segments, args = jax.tree.unflatten(of_segments, policies), jax.tree.unflatten(of_args, arrays)
        made = zip(results, function(local, segments, *map(unwrapped, args)), strict=True)
        return [jax.tree.leaves(x) if kind is Cache else x for kind, x in made]

    def spec(kind: Any) -> Any:
        if kind is Cache:
            return _specs(layout, rows, cache)
        return layout.resolve(kind, NO_SHAPE, rows) if isinstance(kind, PartitionSpec) else tuple(map(spec, kind))

    spread = jax.shard_map(
        part,
        mesh=layout.mesh,
        in_specs=(weight_specs, [spec for s in segments for spec in policy_specs(layout, rows, s.policy)], array_specs),
        out_specs=[spec(kind) for kind in results],
        check_vma=False,  # kernels do not declare the mesh axes over which their results vary
    )
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # whatever mesh the caller has set
        made = spread(weights, policies, arrays)
    whole = zip(results, made, strict=True)
    return tuple(jax.tree.unflatten(jax.tree.structure(cache), x) if kind is Cache else x for kind, x in whole)


def unwrapped(x: Any) -> Any:
    """The value of a `Split`; other arguments as they are."""
    return x.value if isinstance(x, Split) else x


def make_cache(layout: Layout, *args: Any, **settings: Any) -> Cache:
    """`Cache.create(...)` on the devices of a layout, each with its part alone."""
    return _make_cache(layout, args, tuple(settings.items()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_cache(layout: Layout, args: tuple, settings: tuple) -> Cache:
    cache = Cache.create(*args, **dict(settings))
    leaves, structure = jax.tree.flatten(cache)
    return jax.tree.unflatten(structure, jax.lax.with_sharding_constraint(leaves, cache_shardings(layout, cache)))


def cache_shardings(layout: Layout, cache: Any) -> list[NamedSharding]:
    """Where the arrays of a cache, or of one of shapes, lie; in the order of `jax.tree.leaves`."""
    return [NamedSharding(layout.mesh, spec) for spec in _specs(layout, layout.rows(cache.lengths.shape[0]), cache)]


def _specs(layout: Layout, rows: tuple[str, ...], x: Any) -> list[PartitionSpec]:
    """Of the arrays of an argument."""
    arrays = jax.tree.leaves(x)
    named = x.specs() if isinstance(x, Cache) else [x.spec if isinstance(x, Split) else OF_ROWS] * len(arrays)
    return [layout.resolve(spec, array.shape, rows) for spec, array in zip(named, arrays, strict=True)]


def policy_specs(layout: Layout, rows: tuple[str, ...], policy: Any) -> list[PartitionSpec]:
    """Of the arrays of a policy of all layers: values per head and masks are split with the heads, everything else is everywhere."""
    specs = []
    for path, x in jax.tree_util.tree_flatten_with_path(policy)[0]:
        field = path[-1].name if len(path) == 1 else ""
        named = P()
        if field in policy.per_head:
            named = P(None, HEADS)
        elif isinstance(policy, Given):
            named = P(None, ROWS, HEADS)
        if jnp.ndim(x) < 2:
            named = P()
        elif x.shape[len(named) - 1] == 1:  # the same for all heads
            named = P(*named[:-1])
        specs.append(layout.resolve(named, jnp.shape(x), rows))
    return specs


def _placed(x: Any, sharding: NamedSharding) -> Any:
    """An argument on the devices of the mesh, wherever it lay; traced ones as they are."""
    return x if isinstance(x, Tracer) else jax.device_put(x, sharding)

"""Passes of a model that is spread over a mesh: each device runs the code of a single device on its part."""

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

Results = tuple[PartitionSpec | type[Cache], ...]


def on_mesh(function: Callable[..., Any], results: Results, model: Any, segments: Any, *args: Any) -> Any:
    """function(model, segments, *args), computed by every device of the model's mesh on its part of all of them.

    Args:
      function: gets a model with the weights, the heads and the `config` of one device, whose `shard` exchanges with the others.
      results: how each of its results is split, in the names of `seer_jax.sharding.table`; `Cache` for a cache like the one among `args`.
      model: with a `layout`.
      segments: layers under their policies, see `Transformer.segments`.
      *args: arrays [B, ...], whose rows are split, and caches.
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

    def part(weights: tuple, policies: list, arrays: list) -> list[list[Any]]:
        local = Shard(layout, rows).model(of_model, list(zip(paths, weights, strict=True)))
        segments, args = jax.tree.unflatten(of_segments, policies), jax.tree.unflatten(of_args, arrays)
        return [jax.tree.leaves(x) for x in function(local, segments, *args)]

    spread = jax.shard_map(
        part,
        mesh=layout.mesh,
        in_specs=(weight_specs, _policy_specs(layout, rows, segments), array_specs),
        out_specs=[
            _specs(layout, rows, cache) if kind is Cache else [layout.resolve(kind, NO_SHAPE, rows)] for kind in results
        ],
        check_vma=False,  # kernels do not declare the mesh axes over which their results vary
    )
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # whatever mesh the caller has set
        made = spread(weights, policies, arrays)
    whole = zip(results, made, strict=True)
    return tuple(jax.tree.unflatten(jax.tree.structure(cache), x) if kind is Cache else x[0] for kind, x in whole)


def make_cache(layout: Layout, *args: Any, **settings: Any) -> Cache:
    """`Cache.create(...)` on the devices of a layout, each with its part alone."""
    return _make_cache(layout, args, tuple(settings.items()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_cache(layout: Layout, args: tuple, settings: tuple) -> Cache:
    cache = Cache.create(*args, **dict(settings))
    leaves, structure = jax.tree.flatten(cache)
    specs = _specs(layout, layout.rows(cache.lengths.shape[0]), cache)
    shardings = [NamedSharding(layout.mesh, spec) for spec in specs]
    return jax.tree.unflatten(structure, jax.lax.with_sharding_constraint(leaves, shardings))


def _specs(layout: Layout, rows: tuple[str, ...], x: Any) -> list[PartitionSpec]:
    """Of the arrays of an argument."""
    arrays = jax.tree.leaves(x)
    named = x.specs() if isinstance(x, Cache) else [OF_ROWS] * len(arrays)
    return [layout.resolve(spec, array.shape, rows) for spec, array in zip(named, arrays, strict=True)]


def _policy_specs(layout: Layout, rows: tuple[str, ...], segments: Any) -> list[PartitionSpec]:
    """Of the arrays of segments' policies: values per head and masks are split with the heads, everything else is everywhere."""
    specs = []
    for (segment, *path), x in jax.tree_util.tree_flatten_with_path(segments)[0]:
        policy, field = segments[segment.idx].policy, path[-1].name if len(path) == 2 else ""
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

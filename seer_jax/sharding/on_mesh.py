"""Passes of a model that is spread over a mesh: each device runs the code of a single device on its part."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
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
    rows = layout.rows(args[0].shape[0])
    specs = tuple(_argument_spec(layout, rows, x) for x in args)
    args = tuple(_placed(layout, x, spec) for x, spec in zip(args, specs, strict=True))
    return _run(function, results, rows, model, segments, args)


@functools.partial(jax.jit, static_argnames=("function", "results", "rows"))
def _run(function: Callable, results: Results, rows: tuple[str, ...], model: Any, segments: Any, args: tuple) -> Any:
    layout = model.layout
    named, structure = weights_of(model)
    paths, arrays = zip(*named, strict=True)
    weights = tuple(layout.weight_spec(path, x.shape) for path, x in named)
    specs = tuple(_argument_spec(layout, rows, x) for x in args)
    policies = [_policy_spec(layout, rows, segment) for segment in segments]
    cache = next((spec for x, spec in zip(args, specs, strict=True) if isinstance(x, Cache)), None)
    shapes = (0,) * 8  # of results: no name in their specs depends on a size
    out = tuple(cache if kind is Cache else layout.resolve(kind, shapes, rows) for kind in results)

    def part(arrays: tuple, segments: Any, args: tuple) -> Any:
        local = Shard(layout, rows).model(structure, list(zip(paths, arrays, strict=True)))
        return function(local, segments, *args)

    # check_vma: kernels do not declare the mesh axes over which their results vary.
    return jax.shard_map(part, mesh=layout.mesh, in_specs=(weights, policies, specs), out_specs=out, check_vma=False)(
        arrays, segments, args
    )


def make_cache(layout: Layout, *args: Any, **settings: Any) -> Cache:
    """`Cache.create(...)` on the devices of a layout, each with its part alone."""
    return _make_cache(layout, args, tuple(settings.items()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_cache(layout: Layout, args: tuple, settings: tuple) -> Cache:
    cache = Cache.create(*args, **dict(settings))
    shardings = cache_shardings(layout, cache)
    return jax.lax.with_sharding_constraint(cache, shardings)


def cache_shardings(layout: Layout, cache: Cache) -> Any:
    """Where the arrays of a cache lie, as a cache of shardings."""
    specs = _argument_spec(layout, layout.rows(cache.lengths.shape[0]), cache)
    return jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _argument_spec(layout: Layout, rows: tuple[str, ...], x: Any) -> Any:
    named = x.specs() if isinstance(x, Cache) else OF_ROWS
    return jax.tree.map(lambda spec, x: layout.resolve(spec, x.shape, rows), named, x, is_leaf=_is_spec)


def _policy_spec(layout: Layout, rows: tuple[str, ...], segment: Any) -> Any:
    """Specs of a segment's policy: values per head and masks are split with the heads, everything else is everywhere."""
    policy = segment.policy
    specs = jax.tree.map(lambda _: P(), policy)
    named = dict.fromkeys(policy.per_head, P(None, HEADS))
    if isinstance(policy, Given):
        named["mask"] = P(None, ROWS, HEADS)
    changes = {}
    for name, spec in named.items():
        shape = getattr(policy, name).shape
        if len(shape) > 1:
            shared = shape[len(spec) - 1] == 1  # by all heads
            changes[name] = layout.resolve(P(*spec[:-1]) if shared else spec, shape, rows)
    return dataclasses.replace(segment, policy=_replaced(specs, changes))


def _replaced(policy: Any, changes: dict[str, Any]) -> Any:
    """As `dataclasses.replace`, without the checks of a policy's values, which specs are not."""
    new = object.__new__(type(policy))
    for field in dataclasses.fields(policy):
        object.__setattr__(new, field.name, changes.get(field.name, getattr(policy, field.name)))
    return new


def _placed(layout: Layout, x: Any, specs: Any) -> Any:
    """An argument on the devices of the mesh, wherever it lay; traced ones as they are."""

    def place(spec: PartitionSpec, x: Any) -> Any:
        return x if isinstance(x, Tracer) else jax.device_put(x, NamedSharding(layout.mesh, spec))

    return jax.tree.map(place, specs, x, is_leaf=_is_spec)

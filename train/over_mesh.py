"""Gradients of a step over a mesh of devices: each takes its rows and its heads, and they exchange the sums once, at the end."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.on_mesh import OF_ROWS
from seer_jax.sharding.shard import Shard

P = PartitionSpec
ASKED = "asked"  # metric: the signal by which a process is to stop, or 0


def summed_over_mesh(
    function: Callable[..., tuple[Any, Any]],
    layout: Layout,
    trained: Any,
    frozen: Any,
    batch: Any,
    *,
    with_gradients: bool = True,
) -> tuple[Any, Any]:
    """Sum over the devices of function(trained, frozen, batch, shard), which each calls with its part of all arguments.

    Args:
      function: returns (gradients, sums): the former as the trained weights, the latter pytrees of scalars.
      layout: of the model on the mesh.
      trained, frozen: its weights, pytrees whose paths are those of `seer_jax.sharding.table.WEIGHTS`.
      batch: arrays [B, ...], whose rows are split over data and fsdp, which divide B.
      with_gradients: False: the function returns {} in their place.

    Returns:
      (gradients, sums): the former split as the weights are, the latter on every device.
    """
    rows = layout.rows(jax.tree.leaves(batch)[0].shape[0])
    shard = Shard(layout, rows)
    specs = [_specs(layout, weights) for weights in (trained, frozen)]
    of_gradients = specs[0] if with_gradients else {}

    def part(trained: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        gradients, sums = function(trained, frozen, batch, shard)
        return _reduced(layout, gradients, jax.tree.leaves(of_gradients, is_leaf=_is_spec), sums)

    spread = jax.shard_map(
        part,
        mesh=layout.mesh,
        in_specs=(*specs, layout.resolve(OF_ROWS, (0,), rows)),
        out_specs=(of_gradients, P()),
        check_vma=False,  # kernels do not declare the mesh axes over which their results vary
    )
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # whatever mesh the caller has set
        return spread(trained, frozen, batch)


def asking(step: Callable[..., tuple[Any, Any, dict[str, Any]]]) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """A step with a further argument, see `of_processes`, whose largest value is a metric of its own, `ASKED`.

    Each process then learns from the metrics of the same step that one of them is to stop.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def and_ask(trained: Any, state: Any, frozen: Any, batch: Any, number: jax.Array, asked: jax.Array) -> tuple:
        trained, state, metrics = step(trained, state, frozen, batch, number)
        return trained, state, metrics | {ASKED: asked.max()}

    return and_ask


def of_processes(layout: Layout, value: int) -> jax.Array:
    """A number of each process, as an array with one element on each device."""
    sharding = NamedSharding(layout.mesh, P(layout.mesh.axis_names))
    return jax.make_array_from_callback((layout.mesh.size,), sharding, lambda _: np.full(1, value, np.int32))


def _specs(layout: Layout, weights: Any) -> Any:
    """How each of some weights is split."""
    leaves, structure = weights_of(weights)
    return jax.tree.unflatten(structure, [layout.weight_spec(path, x.shape) for path, x in leaves])


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _reduced(layout: Layout, gradients: Any, specs: Sequence[PartitionSpec], sums: Any) -> tuple[Any, Any]:
    """Sums over all devices. Along an axis over which a weight is split its gradient is complete: devices have their own heads there, and
    over fsdp the gradient of a gathered weight is summed where it is scattered."""
    leaves, structure = jax.tree.flatten((gradients, sums))
    split = [{axis for names in spec for axis in _names(names)} for spec in specs]
    split += [set()] * (len(leaves) - len(split))
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, axes in enumerate(split):
        over = tuple(axis for axis, size in layout.mesh.shape.items() if size > 1 and axis not in axes)
        groups.setdefault(over, []).append(place)
    for axes, places in groups.items():
        if axes:
            for place, x in zip(places, jax.lax.psum([leaves[i] for i in places], axes), strict=True):
                leaves[place] = x
    return jax.tree.unflatten(structure, leaves)


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else names

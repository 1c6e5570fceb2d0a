"""One device's part of a program on a mesh as a program of its own, for planning memory where the devices are not there."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.on_mesh import policy_specs
from seer_jax.sharding.shard import Shard
from seer_jax.sharding.table import ROWS

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class PlannedShard(Shard):
    """One device's part of a model in a program that has no other devices.

    It computes on arrays of the shapes that a device of the mesh has. In place of what the devices would exchange it takes its own part,
    repeated where parts would be joined, so that the compiler lays out as much memory. What it computes means nothing.
    """

    def index(self, axes: tuple[str, ...]) -> Int[Array, ""]:
        return jnp.int32(0)

    # The barriers keep the compiler from computing with the part alone, or from leaving the repeated array out.
    def sum(self, x: Shaped[Array, "..."], axes: tuple[str, ...]) -> Shaped[Array, "..."]:
        return jax.lax.optimization_barrier(x)

    def mean(self, x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        return jax.lax.optimization_barrier(x)

    def max(self, x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        return jax.lax.optimization_barrier(x)

    def gather(self, x: Shaped[Array, "..."], axes: tuple[str, ...], axis: int) -> Shaped[Array, "..."]:
        parts = self.layout.size(*axes)
        repeated = jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], parts, *x.shape[axis:]))
        return jax.lax.optimization_barrier(repeated.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]))


def planned_model(model: Any, layout: Layout, rows: tuple[str, ...]) -> Any:
    """The part of a model that one device of a mesh has, of shapes.

    Args:
      model: a `Transformer` of arrays or shapes.
      layout: of the mesh.
      rows: axes over which the rows of a batch are split.
    """
    leaves, structure = weights_of(model)
    parts = [part_of_shape(layout, x, layout.weight_spec(path, x.shape)) for path, x in leaves]
    return PlannedShard(layout, rows).with_weights(structure, parts)


def planned_rows(layout: Layout, rows: tuple[str, ...], tree: Any) -> Any:
    """The shapes of arrays [B, ...] with the rows that one device has."""
    return jax.tree.map(lambda x: part_of_shape(layout, x, layout.resolve(P(ROWS), x.shape, rows)), tree)


def planned_policy(layout: Layout, rows: tuple[str, ...], policy: Any) -> Any:
    """The shapes of a policy of the whole model, see `Policy.stacked`, with what one device has of its arrays."""
    leaves, structure = jax.tree.flatten(policy)
    specs = policy_specs(layout, rows, policy)
    return jax.tree.unflatten(structure, [part_of_shape(layout, x, s) for x, s in zip(leaves, specs, strict=True)])


def part_of_shape(layout: Layout, x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """The shape of a device's part of an array.

    Args:
      layout: of the mesh.
      x: array or shape.
      spec: how its first axes are split, in the names of the mesh.
    """
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    split = [1 if axes is None else math.prod(layout.size(axis) for axis in _tuple(axes)) for axes in spec]
    split += [1] * (len(kind.shape) - len(split))
    shape = tuple(size // parts for size, parts in zip(kind.shape, split, strict=True))
    return jax.ShapeDtypeStruct(shape, kind.dtype, weak_type=kind.weak_type)


def _tuple(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes

"""One device's part of a model on a mesh, and what the devices exchange."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Shaped

from seer_jax.models.config import ModelConfig
from seer_jax.sharding.layout import Layout, weights_of
from seer_jax.sharding.table import ADDED_ONCE, COPIES, FSDP, KV, ROWS, TENSOR, WEIGHTS

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's part of a model, inside `jax.shard_map`: what it exchanges with the others.

    Attributes:
      layout: of the model.
      rows: axes over which the rows of the batch are split.
    """

    layout: Layout
    rows: tuple[str, ...]

    def axes(self, name: str) -> tuple[str, ...]:
        """Axes of the mesh that ROWS, TENSOR or KV stand for."""
        return {ROWS: self.rows, TENSOR: self.layout.tensor, KV: (TENSOR,)}[name]

    def index(self, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Number of this device along axes of the mesh."""
        return jax.lax.axis_index(axes)

    def sum(self, x: Shaped[Array, "..."], axes: tuple[str, ...]) -> Shaped[Array, "..."]:
        """Sum over the devices along axes of the mesh."""
        return jax.lax.psum(x, axes)

    def mean(self, x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        """Mean over the devices along axes of the mesh."""
        return jax.lax.pmean(x, axes)

    def max(self, x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
        """Maximum over the devices along axes of the mesh."""
        return jax.lax.pmax(x, axes)

    def gather(self, x: Shaped[Array, "..."], axes: tuple[str, ...], axis: int) -> Shaped[Array, "..."]:
        """The parts that the devices along axes of the mesh have, joined along an axis of the array."""
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True)

    @property
    def gathers(self) -> bool:
        """Whether layers must be gathered before they are used."""
        return self.layout.size(FSDP) > 1

    @property
    def _splits_heads(self) -> bool:
        return self.sharing > 1

    def config(self, config: ModelConfig) -> ModelConfig:
        """The configuration of the part: its own heads."""
        heads = config.num_heads // self.layout.size(*self.layout.tensor)
        return dataclasses.replace(
            config, num_heads=heads, num_kv_heads=config.num_kv_heads // self.layout.size(TENSOR)
        )

    def model(self, structure: Any, leaves: Sequence[tuple[str, Array]]) -> Any:
        """The part as a model that computes with what it has.

        Args:
          structure, leaves: see `weights_of`; the device's parts of the arrays.
        """
        first = self.index(self.layout.tensor) == 0
        arrays = [jnp.where(first, x, jnp.zeros_like(x)) if path in ADDED_ONCE else x for path, x in leaves]
        return self.with_weights(structure, arrays)

    def with_weights(self, structure: Any, weights: Sequence[Any]) -> Any:
        """A model of the device's parts of the weights, which may be shapes."""
        part = jax.tree.unflatten(structure, weights)
        part.config, part.layout, part.shard = self.config(part.config), None, self
        for gate in (part.prefill_gate, part.decode_gate):
            if gate is not None:
                gate.model = self.config(gate.model)
        return part

    def whole(self, layer: Any, x: Float[Array, "..."], prefix: str = "layers") -> tuple[Any, Float[Array, "..."]]:
        """(a layer with its weights gathered over fsdp, x).

        Args:
          layer: one layer's module, whose weights have no axis over layers.
          x: its input, see `after`.
          prefix: path of the stack of layers.
        """
        if not self.gathers:
            return layer, x
        layer, x = self.after(layer, x)
        leaves, structure = weights_of(layer)
        arrays = [self.gathered(x, P(*WEIGHTS[f"{prefix}.{path}"][1:])) for path, x in leaves]
        return jax.tree.unflatten(structure, arrays), x

    def after(self, later: Any, first: Any) -> tuple[Any, Any]:
        """(later, first): pytrees of arrays, the former such that nothing is exchanged of it before the latter is there.

        In a backward pass the gradient of `first` is there after that of `later`. For CPU devices alone: XLA starts what follows a loop
        before the loop has ended, unless it needs the loop's results, and devices that then exchange two arrays at a time take one for
        the other. GPUs exchange in the order of the program.
        """
        mesh = self.layout.mesh
        ordered = isinstance(mesh, Mesh) and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        return _after(later, first) if ordered else (later, first)

    def gathered(self, x: Array, spec: PartitionSpec) -> Array:
        """A weight gathered over fsdp, where its spec has that axis."""
        axes = [
            axis for axis, names in enumerate(spec) if names == FSDP or (isinstance(names, tuple) and FSDP in names)
        ]
        return self.gather(x, (FSDP,), axes[0]) if axes and self.gathers else x

    def sum_over_tensor(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sum over the devices that share the rows of a batch."""
        return self.sum(x, self.layout.tensor) if self._splits_heads else x

    def mean_over_tensor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Mean over the devices that share the rows of a batch."""
        return self.mean(x, self.layout.tensor) if self._splits_heads else x

    def sum_over_rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sum over the devices that have different rows of a batch."""
        return self.sum(x, self.rows) if self.layout.size(*self.rows) > 1 else x

    @property
    def sharing(self) -> int:
        """Devices that share the rows of a batch."""
        return self.layout.size(*self.layout.tensor)

    def embed(self, table: Float[Array, "v e"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Rows of the embedding, of which each device has some."""
        table = self.gathered(table, WEIGHTS["embed_tokens"])
        place = tokens - self.index(self.layout.tensor) * table.shape[0]
        here = (place >= 0) & (place < table.shape[0])
        rows = table[jnp.where(here, place, 0)]
        return self.sum_over_tensor(jnp.where(here[..., None], rows, jnp.zeros_like(rows)))

    def whole_vocabulary(self, logits: Float32[Array, "*b v"]) -> Float32[Array, "*b V"]:
        """Logits of all tokens, from those of each device's part of the vocabulary."""
        if not self._splits_heads:
            return logits
        return self.gather(logits, self.layout.tensor, logits.ndim - 1)

    def group(self, q: Float[Array, "B T h D"]) -> Float[Array, "B T H D"]:
        """The query heads of whole groups, where several devices hold the queries of one key/value head."""
        return q if self.layout.copies == 1 else self.gather(q, (COPIES,), 2)

    def own_heads(self, x: Float[Array, "..."], axis: int = 2) -> Float[Array, "..."]:
        """This device's heads of those of `group`, which are an axis of x."""
        heads = x.shape[axis] // self.layout.copies
        if heads == x.shape[axis]:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.index((COPIES,)) * heads, heads, axis=axis)

    def mean_of_group(self, mean: Float[Array, "..."]) -> Float[Array, "..."]:
        """The mean over the query heads of a group, from that over the heads of it which this device has."""
        return mean if self.layout.copies == 1 else self.mean(mean, (COPIES,))


@jax.custom_vjp
def _after(later: Any, first: Any) -> tuple[Any, Any]:
    """See `Shard.after`."""
    return _waiting(later, first), first


def _after_forward(later: Any, first: Any) -> tuple[tuple[Any, Any], list]:
    """With which arrays of `later` have a gradient, those of the weights that are trained: for no other one it is computed."""
    leaves, structure = jax.tree.flatten((later, first))
    later, first = jax.tree.unflatten(structure, [x.value for x in leaves])
    trained = [None if x.perturbed else () for x in leaves[: len(jax.tree.leaves(later))]]
    return (_waiting(later, first), first), trained


def _after_backward(trained: list, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    zero: Any = jax.custom_derivatives.SymbolicZero
    later, first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, zero) else x, gradients)
    arrays = [x for x, constant in zip(jax.tree.leaves(later), trained, strict=True) if constant is None]
    return later, _waiting(first, arrays)


_after.defvjp(_after_forward, _after_backward, symbolic_zeros=True)


def _waiting(later: Any, first: Any) -> Any:
    """The arrays `later` as they are, computed from those of `first`. XLA drops an `optimization_barrier` before it orders a CPU's operations,
    but not a choice by a number that it does not know to be odd."""
    elements = [x.ravel()[0].astype(jnp.int32) for x in jax.tree.leaves(first) if x.dtype != jax.dtypes.float0]
    never = sum(elements, start=jnp.int32(0)) | 1 == 0
    return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0 else jnp.where(never, jnp.zeros_like(x), x), later)


def part_of(
    shard: Shard | None, make: Callable[[tuple[int, ...]], Array], shape: Sequence[int], names: Sequence[str]
) -> Array:
    """A device's part of an array that is made for the whole model, such as random values.

    Args:
      shard: of the device; None: the part is everything.
      make: makes the array from its shape.
      shape: of the part.
      names: how the first axes are split: ROWS, TENSOR or KV.
    """
    if shard is None:
        return make(tuple(shape))
    sizes = [shard.layout.size(*shard.axes(name)) for name in names]
    sizes += [1] * (len(shape) - len(sizes))
    x = make(tuple(size * devices for size, devices in zip(shape, sizes, strict=True)))
    for axis, name in enumerate(names):
        if axes := shard.axes(name):
            x = jax.lax.dynamic_slice_in_dim(x, shard.index(axes) * shape[axis], shape[axis], axis)
    return x

"""One device's part of a model on a mesh, and what the devices exchange."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
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

    @property
    def gathers(self) -> bool:
        """Whether layers must be gathered before they are used."""
        return self.layout.size(FSDP) > 1

    @property
    def _splits_heads(self) -> bool:
        return self.layout.size(*self.layout.tensor) > 1

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
        first = jax.lax.axis_index(self.layout.tensor) == 0
        arrays = [jnp.where(first, x, jnp.zeros_like(x)) if path in ADDED_ONCE else x for path, x in leaves]
        part = jax.tree.unflatten(structure, arrays)
        part.config, part.layout, part.shard = self.config(part.config), None, self
        for gate in (part.prefill_gate, part.decode_gate):
            if gate is not None:
                gate.model = self.config(gate.model)
        return part

    def whole(self, layer: Any, prefix: str = "layers") -> Any:
        """A layer with its weights gathered over fsdp.

        Args:
          layer: one layer's module, whose weights have no axis over layers.
          prefix: path of the stack of layers.
        """
        if not self.gathers:
            return layer
        leaves, structure = weights_of(layer)
        arrays = [self.gathered(x, P(*WEIGHTS[f"{prefix}.{path}"][1:])) for path, x in leaves]
        return jax.tree.unflatten(structure, arrays)

    def gathered(self, x: Array, spec: PartitionSpec) -> Array:
        """A weight gathered over fsdp, where its spec has that axis."""
        axes = [
            axis for axis, names in enumerate(spec) if names == FSDP or (isinstance(names, tuple) and FSDP in names)
        ]
        return jax.lax.all_gather(x, FSDP, axis=axes[0], tiled=True) if axes and self.gathers else x

    def sum_over_tensor(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sum over the devices that share the rows of a batch."""
        return jax.lax.psum(x, self.layout.tensor) if self._splits_heads else x

    def mean_over_tensor(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Mean over the devices that share the rows of a batch."""
        return jax.lax.pmean(x, self.layout.tensor) if self._splits_heads else x

    def embed(self, table: Float[Array, "v e"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Rows of the embedding, of which each device has some."""
        table = self.gathered(table, WEIGHTS["embed_tokens"])
        place = tokens - jax.lax.axis_index(self.layout.tensor) * table.shape[0]
        here = (place >= 0) & (place < table.shape[0])
        rows = table[jnp.where(here, place, 0)]
        return self.sum_over_tensor(jnp.where(here[..., None], rows, jnp.zeros_like(rows)))

    def whole_vocabulary(self, logits: Float32[Array, "*b v"]) -> Float32[Array, "*b V"]:
        """Logits of all tokens, from those of each device's part of the vocabulary."""
        if not self._splits_heads:
            return logits
        return jax.lax.all_gather(logits, self.layout.tensor, axis=logits.ndim - 1, tiled=True)

    def group(self, q: Float[Array, "B T h D"]) -> Float[Array, "B T H D"]:
        """The query heads of whole groups, where several devices hold the queries of one key/value head."""
        return q if self.layout.copies == 1 else jax.lax.all_gather(q, COPIES, axis=2, tiled=True)

    def own_heads(self, x: Float[Array, "B T H D"]) -> Float[Array, "B T h D"]:
        """This device's heads of `group`."""
        heads = x.shape[2] // self.layout.copies
        if heads == x.shape[2]:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(COPIES) * heads, heads, axis=2)

    def mean_of_group(self, mean: Float[Array, "..."]) -> Float[Array, "..."]:
        """The mean over the query heads of a group, from that over the heads of it which this device has."""
        return mean if self.layout.copies == 1 else jax.lax.pmean(mean, COPIES)


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
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * shape[axis], shape[axis], axis)
    return x

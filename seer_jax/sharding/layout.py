"""How a model lies on a mesh: which part of each array a device has."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from seer_jax.models.config import ModelConfig
from seer_jax.sharding.table import AXES, COPIES, DATA, FSDP, GATES, HEADS, KV, ROWS, TENSOR, WEIGHTS

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model lies on a mesh.

    Attributes:
      mesh: axes data, fsdp and tensor; where there are fewer key/value heads than `tensor` devices, the last one is two axes,
        `tensor` of different heads and `copies` of the same one. All of type Auto. Without devices where memory is planned.
      num_heads, num_kv_heads: H and K of the whole model.
    """

    mesh: Mesh | AbstractMesh
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, config: ModelConfig) -> "Layout":
        """The layout of a model on a mesh.

        Args:
          mesh: of axes among data, fsdp and tensor, with any axis types; without devices for `plan_memory`.
          config: of the model.

        Raises:
          ValueError: the mesh has other axes, or the model can't be split by it.

        Warns:
          RuntimeWarning: there are fewer key/value heads than `tensor` devices, so that some hold the same.
        """
        sizes = dict(mesh.shape)
        if other := [axis for axis, size in sizes.items() if axis not in AXES and size > 1]:
            raise ValueError(
                f"A mesh must have axes among {', '.join(AXES)}; got {', '.join(map(str, sizes))}. Rename {', '.join(map(str, other))}, or "
                'make the mesh by seer_jax.sharding.make_mesh("data=2,tensor=2").'
            )
        if isinstance(mesh, Mesh) and len(set(mesh.devices.flat)) < mesh.size:
            raise ValueError(
                f"The devices of a mesh must differ; got {mesh.size}, of which {len(set(mesh.devices.flat))} differ. Make the mesh by "
                'seer_jax.sharding.make_mesh("data=2,tensor=2").'
            )
        data, fsdp, tensor = (sizes.get(axis, 1) for axis in AXES)
        _check_splits(config, fsdp, tensor)
        kv_heads = config.num_kv_heads
        names, shape = AXES, (data, fsdp, tensor)
        if kv_heads < tensor:
            names, shape = (*AXES, COPIES), (data, fsdp, kv_heads, tensor // kv_heads)
            warnings.warn(
                f"{tensor} devices of the mesh axis tensor share {kv_heads} key/value heads: {tensor // kv_heads} devices each hold the "
                "same keys, values and cache.",
                RuntimeWarning,
                stacklevel=2,
            )
        return cls(_auto_mesh(mesh, shape, names), config.num_heads, kv_heads)

    @property
    def copies(self) -> int:
        """Devices of the axis tensor that have the same key/value heads."""
        return dict(self.mesh.shape).get(COPIES, 1)

    @property
    def tensor(self) -> tuple[str, ...]:
        """Axes of the mesh over which query heads are split."""
        return (TENSOR, COPIES) if self.copies > 1 else (TENSOR,)

    def size(self, *axes: str) -> int:
        """Devices along axes of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def rows(self, batch: int) -> tuple[str, ...]:
        """Axes of the mesh over which the rows of a batch are split: data and fsdp, as far as the number of rows can be divided by
        them. Devices along the others compute the same rows."""
        choices = ((DATA, FSDP), (DATA,), (FSDP,))
        return max((c for c in choices if batch % self.size(*c) == 0), key=lambda c: self.size(*c), default=())

    def resolve(self, spec: PartitionSpec, shape: Sequence[int], rows: tuple[str, ...] = ()) -> PartitionSpec:
        """A spec with axes of this mesh in place of the names of this module.

        Args:
          spec: of an array.
          shape: of the array.
          rows: see `rows`.
        """

        def axes(name: str | tuple[str, ...] | None, size: int) -> tuple[str, ...]:
            if isinstance(name, tuple):
                return sum((axes(n, size) for n in name), ())
            if name == HEADS:
                name = TENSOR if size == self.num_heads else KV
            known: dict[str, tuple[str, ...]] = {ROWS: rows, KV: (TENSOR,), TENSOR: self.tensor}
            return () if name is None else known.get(name, (name,))

        return P(*(axes(name, size) or None for name, size in zip(spec, shape, strict=False)))

    def weight_spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """Which axes of a weight are split.

        Args:
          path: attributes that lead to the weight, joined by dots.
          shape: of the weight.

        Raises:
          NotImplementedError: the weight is not in the table.
        """
        name = functools.reduce(str.removeprefix, GATES, path)
        if name not in WEIGHTS:
            raise NotImplementedError(
                f"A model on a mesh must have weights that seer_jax.sharding.table.WEIGHTS splits; got {path}. Add a row there, or load the "
                "model without a mesh."
            )
        return self.resolve(WEIGHTS[name], shape)

    def sharding(self, path: str, array: Any) -> NamedSharding:
        """Where a weight lies; for `convert.load_base`."""
        return NamedSharding(self.mesh, self.weight_spec(path, array.shape))

    def replicated(self, tree: Any) -> Any:
        """A pytree of traced arrays with all of them on every device."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    def everywhere(self, tree: Any) -> Any:
        """A pytree of arrays with all of them on every device, so that each process can read them; all processes must call."""
        return jax.jit(self.replicated)(tree)

    def placed(self, model: Any) -> Any:
        """A model or gate-carrying module with its weights on the mesh, as they come: arrays are moved, shapes get their sharding."""

        def place(path: str, x: Any) -> Any:
            sharding = self.sharding(path, x)
            return x.update(sharding=sharding) if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, sharding)

        leaves, structure = weights_of(model)
        return jax.tree.unflatten(structure, [place(path, x) for path, x in leaves])

    def spread(self, model: Any) -> Any:
        """A `Transformer` that is in memory, spread over the mesh."""
        spread = self.placed(model)
        spread.layout = self
        return spread


def _auto_mesh(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh | AbstractMesh:
    """A mesh with its axes in the order of AXES, the last of which may be two, and all of type Auto."""
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    order += [i for i in range(len(mesh.axis_names)) if i not in order]
    return Mesh(mesh.devices.transpose(order).reshape(shape), names, axis_types=types)


def place(model: Any, mesh: Mesh) -> Any:
    """A model that is in memory already, spread over a mesh; see `from_pretrained` for one on disk.

    Args:
      model: a `Transformer`.
      mesh: see `make_mesh`. A mesh of one device takes the same way as a larger one.

    Raises:
      ValueError: see `Layout.of`.
    """
    return Layout.of(mesh, model.config).spread(model)


def weights_of(module: Any) -> tuple[list[tuple[str, Any]], Any]:
    """(path and array of each weight, structure) of a module."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return list(zip(names, (x for _, x in leaves), strict=True)), structure


def _check_splits(config: ModelConfig, fsdp: int, tensor: int) -> None:
    """Raises ValueError where a model can't be split."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    widths = (("intermediate_size", config.intermediate_size), ("vocab_size", config.vocab_size))
    usable = [
        n
        for n in range(1, heads + 1)
        if not heads % n and not (kv_heads % n and n % kv_heads) and not any(width % n for _, width in widths)
    ]
    remedy = f"Use tensor={' or '.join(map(str, usable))}."
    if heads % tensor:
        raise ValueError(
            f"The {heads} query heads of the model must be divisible by the mesh axis tensor; got tensor={tensor}. {remedy}"
        )
    if kv_heads % tensor and tensor % kv_heads:
        raise ValueError(
            f"The {kv_heads} key/value heads of the model must be divisible by the mesh axis tensor, or divide it; got tensor={tensor}. "
            f"{remedy}"
        )
    for name, width in widths:
        if width % tensor:
            raise ValueError(
                f"The model's {name} of {width} must be divisible by the mesh axis tensor; got tensor={tensor}. {remedy}"
            )
    dim, kv_parts = config.head_dim, min(tensor, kv_heads)
    parts = (("hidden_size", config.hidden_size), *((name, width // tensor) for name, width in widths))
    parts += (("query channels", heads * dim // tensor), ("key channels", kv_heads * dim // kv_parts))
    most = math.gcd(*(width for _, width in parts))
    for name, width in parts:
        if width % fsdp:
            by = f" / {tensor}" if tensor > 1 and name != "hidden_size" else ""
            raise ValueError(
                f"The model's {name}{by} of {width} must be divisible by the mesh axis fsdp; got fsdp={fsdp}. Use an fsdp size that "
                f"divides {most}, and the axis data for the other devices."
            )

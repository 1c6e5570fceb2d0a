"""Meshes of devices from text such as `data=2,fsdp=2,tensor=2`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from seer_jax.sharding.table import AXES


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices from its axes and their sizes.

    Args:
      text: such as "data=2,fsdp=2,tensor=2": axes among data, fsdp and tensor, in any order; one that is left out has size 1, and one
        of size -1 takes the devices that the others leave.
      devices: to choose from, the first ones first; None: all of JAX.

    Returns:
      A mesh with all three axes, `tensor` innermost, so that its devices are neighbours.

    Raises:
      ValueError: the text is none of this, or there are too few devices.

    >>> make_mesh("tensor=1").shape
    OrderedDict({'data': 1, 'fsdp': 1, 'tensor': 1})
    """
    every = list(jax.devices() if devices is None else devices)
    sizes = _sizes(text)
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        if len(every) % known:
            raise ValueError(
                f"A mesh with an axis of size -1 must divide the {len(every)} devices by its other axes; got {text!r}, "
                f"whose other axes have {known}. Choose sizes whose product divides {len(every)}."
            )
        sizes = {axis: len(every) // known if size == -1 else size for axis, size in sizes.items()}
    count = math.prod(sizes.values())
    if count > len(every):
        raise ValueError(
            f"A mesh must fit the {len(every)} device{'s' * (len(every) > 1)} that JAX has here ({every[0].platform}); got {text!r}, which is "
            f"{count} devices. Lower a size; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={count} makes as many."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=every[:count])


def make_abstract_mesh(text: str) -> AbstractMesh:
    """The mesh of `make_mesh`, without devices: for `plan_memory`.

    Args:
      text: as in `make_mesh`, but no size may be -1.

    Raises:
      ValueError: the text is none of this.

    >>> make_abstract_mesh("tensor=8").shape
    OrderedDict({'data': 1, 'fsdp': 1, 'tensor': 8})
    """
    return AbstractMesh(tuple(mesh_sizes(text).values()), AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(text: str) -> dict[str, int]:
    """Size of each axis of a mesh without devices; raises ValueError as `make_abstract_mesh`."""
    sizes = _sizes(text)
    if -1 in sizes.values():
        raise ValueError(
            f"A mesh that is planned must have a size for each axis; got {text!r}. Write for example tensor=8."
        )
    return sizes


def check_mesh(text: str) -> None:
    """Raises ValueError where a text describes no mesh, whatever devices there are; see `make_mesh`."""
    _sizes(text)


def _sizes(text: str) -> dict[str, int]:
    """Size of each axis of a mesh that is written as text."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if name not in AXES or not equals or name in sizes:
            raise ValueError(
                f"A mesh must be written as axes with sizes, each of {', '.join(AXES)} at most once; got {part.strip()!r} in "
                f"{text!r}. Write for example data=2,tensor=2."
            )
        if size != "-1" and not (size.isdecimal() and int(size)):
            raise ValueError(
                f"The size of a mesh axis must be a whole number of devices, or -1 for all that are left; got {part.strip()!r}. "
                "Write for example data=2,tensor=2."
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"At most one axis of a mesh may have size -1; got {text!r}. Give the others a size.")
    return {axis: sizes.get(axis, 1) for axis in AXES}

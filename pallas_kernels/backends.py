"""How an operation picks its implementation.

An operation is a folder. A backend of it is a module in that folder, named after the backend, holding a function named after the
operation that takes the arguments of the public function less `implementation`. It is imported when it is first needed, so that a
GPU backend costs nothing where it cannot run.

Whether a backend runs depends on its arguments and on their device (`devices.py`). Under jit that device is unknown: a backend that
needs a GPU is then traced beside the one that runs everywhere, wherever this process has such a GPU, and the lowered program
contains the one that its platform can run.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import devices
from pallas_kernels.devices import HOPPER, GpuRequirement

Implementation = Literal["reference", "xla", "mosaic_gpu"]


class Unsupported(NotImplementedError):
    """A backend cannot do what is asked of it; another one may. Raised before any work is done."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A module of an operation's folder.

    Args:
      name: of the module, and of the implementation in the public function.
      needs: the GPU that it needs; None: any device will do.
    """

    name: str
    needs: GpuRequirement | None = None

    def is_decided_when_lowered(self, arguments: Any) -> bool:
        """Whether these arguments leave the device open.

        Raises:
          Unsupported: they are on a device on which the backend does not run, or no device here is one on which it does.
        """
        if self.needs is None:
            return False
        if devices.hopper_is_assumed():
            return devices.interpreter() is None and devices.is_traced(arguments)
        if devices.is_traced(arguments) and self.needs.is_here():
            return True
        reason = self.needs.why_not(devices.device_of(arguments))
        if reason is not None:
            raise Unsupported(reason)
        return False


XLA = Backend("xla")
MOSAIC_GPU = Backend("mosaic_gpu", needs=HOPPER)
REFERENCE = Backend("reference")


@dataclasses.dataclass(frozen=True)
class Operation:
    """The backends of one operation.

    Args:
      name: name of the public function.
      package: the operation's folder, as a module name.
      preferred: backends that `implementation=None` tries, best first; the last one must do everything on every device.
      others: backends that run only when they are named.
      gradients: name of a function in the last preferred backend, which makes a backend that needs a GPU differentiable. It takes
        the cotangents of the results and the operation's arguments, and returns the gradients in the first ones of these. None:
        such a backend has the gradients that JAX finds, if any.
      gradients_use_results: whether that function takes the results first.
    """

    name: str
    package: str
    preferred: tuple[Backend, ...] = (MOSAIC_GPU, XLA)
    others: tuple[Backend, ...] = (REFERENCE,)
    gradients: str | None = None
    gradients_use_results: bool = False

    def __call__(self, implementation: str | None, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the named backend, or without a name the first preferred one that takes these arguments.

        Raises:
          ValueError: there is no backend of that name.
          Unsupported: the named backend, or every preferred one, cannot do this. If it is the platform of a jitted program that
            cannot, lowering the program raises this.
        """
        if implementation is not None:
            return self._run(self._named(implementation), None, args, kwargs)
        reasons = []
        for backend in self.preferred:
            try:
                return self._run(backend, self.preferred[-1], args, kwargs)
            except Unsupported as error:
                reasons.append(f"{backend.name}: {error}")
        raise Unsupported(f"{self.name}: no backend can do this. " + "; ".join(reasons))

    @property
    def implementations(self) -> tuple[str, ...]:
        """What the public function takes as `implementation`."""
        return tuple(backend.name for backend in self.preferred + self.others)

    def used_here(self) -> str:
        """Name of the backend that `implementation=None` tries first on the default device."""
        for backend in self.preferred[:-1]:
            try:
                backend.is_decided_when_lowered(())
                return backend.name
            except Unsupported:
                continue
        return self.preferred[-1].name

    def function(self, backend: Backend, name: str | None = None) -> Callable[..., Any]:
        """A function of a backend's module; the operation itself if `name` is None."""
        return getattr(importlib.import_module(f"{self.package}.{backend.name}"), name or self.name)

    def _named(self, name: str) -> Backend:
        for backend in self.preferred + self.others:
            if backend.name == name:
                return backend
        raise ValueError(f"{self.name}: implementation must be None or one of {self.implementations}; got {name!r}.")

    def _run(self, backend: Backend, otherwise: Backend | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a backend; `otherwise` runs if the program is lowered for a platform for which the backend is not, None: nothing."""
        open_device = backend.is_decided_when_lowered((args, kwargs))
        if backend.needs is None:
            return self.function(backend)(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        dynamic = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        static = tuple(None if d else leaf for d, leaf in zip(dynamic, leaves, strict=True))
        call = _Call(self, backend, otherwise, open_device, structure, static, tuple(dynamic))
        run = _run if self.gradients is None else _run_differentiably
        return run(call, *(leaf for d, leaf in zip(dynamic, leaves, strict=True) if d))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call less its arrays, as JAX's caches compare it.

    Attributes:
      operation, backend: which function runs.
      otherwise: what runs on a platform that the backend is not for; None: nothing.
      open_device: whether the platform is not known yet.
      structure, static: the arguments; None in the places of the arrays.
      is_array: which of the arguments' leaves are arrays.
    """

    operation: Operation
    backend: Backend
    otherwise: Backend | None
    open_device: bool
    structure: Hashable
    static: tuple[Any, ...]
    is_array: tuple[bool, ...]

    def arguments(self, arrays: tuple[jax.Array, ...]) -> tuple[tuple, dict[str, Any]]:
        remaining = iter(arrays)
        leaves = [next(remaining) if d else leaf for d, leaf in zip(self.is_array, self.static, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def run(self, backend: Backend, *arrays: jax.Array) -> Any:
        args, kwargs = self.arguments(arrays)
        return self.operation.function(backend)(*args, **kwargs)

    def refuse(self, *arrays: jax.Array) -> Any:
        """Arrays like the results, in a program that cannot be lowered."""
        results = jax.eval_shape(functools.partial(self.run, self.backend), *arrays)
        flat, structure = jax.tree.flatten(results)
        avals = tuple((x.shape, x.dtype) for x in flat)
        return jax.tree.unflatten(structure, _refuse_p.bind(avals=avals, requirement=self.backend.needs))


def _run(call: _Call, *arrays: jax.Array) -> Any:
    return _choose_when_lowered(call, *arrays) if call.open_device else call.run(call.backend, *arrays)


# Jitted, so that under an eager `jax.grad` or `jax.vmap`, too, it is the device of the arrays that decides.
@functools.partial(jax.jit, static_argnums=0)
def _choose_when_lowered(call: _Call, *arrays: jax.Array) -> Any:
    default = call.refuse if call.otherwise is None else functools.partial(call.run, call.otherwise)
    return jax.lax.platform_dependent(*arrays, cuda=functools.partial(call.run, call.backend), default=default)


# The rule stands outside of the choice: JAX would differentiate each branch of it, and each would carry the other's residuals along.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_differentiably(call: _Call, *arrays: jax.Array) -> Any:
    return _run(call, *arrays)


def _forward_rule(call: _Call, *arrays: jax.Array) -> tuple[Any, tuple]:
    results = _run(call, *arrays)
    return results, (arrays, results if call.operation.gradients_use_results else None)


def _backward_rule(call: _Call, residuals: tuple, cotangents: Any) -> tuple:
    arrays, results = residuals
    operation = call.operation
    args, kwargs = call.arguments(arrays)
    before = (results,) if operation.gradients_use_results else ()
    gradients = operation.function(operation.preferred[-1], operation.gradients)(*before, cotangents, *args, **kwargs)
    return *gradients, *(None,) * (len(arrays) - len(gradients))


_run_differentiably.defvjp(_forward_rule, _backward_rule)

# Takes nothing, so that it needs no rules for gradients and vmap.
_refuse_p = Primitive("refuse_platform")
_refuse_p.multiple_results = True


@_refuse_p.def_abstract_eval
def _refuse_shapes(*, avals: tuple[tuple[tuple[int, ...], Any], ...], requirement: GpuRequirement) -> list[Any]:
    del requirement
    return [ShapedArray(shape, dtype) for shape, dtype in avals]


def _refuse_to_lower(ctx: Any, *, avals: Any, requirement: GpuRequirement) -> Any:
    del avals
    raise Unsupported(requirement.message(", ".join(ctx.module_context.platforms)))


mlir.register_lowering(_refuse_p, _refuse_to_lower)

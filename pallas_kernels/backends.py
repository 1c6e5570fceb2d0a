"""Operations and their backends.

An operation is a folder. Each of its backends is a module there, with a function of the operation's name that takes the arguments of
the public function except `implementation`. It is imported on first use, so that a GPU backend costs nothing on other machines.

Whether a backend runs depends on the arguments and on their device (`devices.py`). Under jit the device is unknown. If this process
has a GPU that a backend needs, it is traced along with the backend for all devices, and lowering keeps the one for its platform.
"""

import dataclasses
import functools
import importlib
import itertools
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
      name: name of the module, and value of `implementation` in the public function.
      needs: the GPU that it needs; None: any device.
    """

    name: str
    needs: GpuRequirement | None = None

    def runs_on(self, device: Any) -> bool:
        """Whether the backend runs on a device."""
        return self.needs is None or devices.hopper_is_assumed() or self.needs.why_not(device) is None

    def is_decided_when_lowered(self, arguments: Any) -> bool:
        """Whether the device of these arguments is known only at lowering, and may be one that the backend needs.

        Raises:
          Unsupported: it is known, or certain, that the backend cannot run there.
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
      preferred: backends that `implementation=None` tries, fastest first; the last one takes all arguments on all devices.
      others: backends that run only by name.
      gradients: name of a function that differentiates backends that need a GPU: the backend's own if its module has one, otherwise
        that of the last preferred backend. It takes the cotangents of the results and the operation's arguments, and returns the
        gradients in the leading arguments. None: the gradients of such backends are JAX's own, if any.
      gradients_use_results: whether that function takes the results before the cotangents.
    """

    name: str
    package: str
    preferred: tuple[Backend, ...] = (MOSAIC_GPU, XLA)
    others: tuple[Backend, ...] = (REFERENCE,)
    gradients: str | None = None
    gradients_use_results: bool = False

    def __call__(self, implementation: str | None, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the named backend, or the first preferred one that takes these arguments if `implementation` is None.

        Raises:
          ValueError: there is no backend of that name.
          Unsupported: the named backend, or every preferred one, does not take these arguments. If the reason is the platform of
            a jitted program, lowering raises it.
        """
        reasons = []
        with jax.named_scope(self.name):
            if implementation is not None:
                return self._run(self._named(implementation), None, args, kwargs)
            for backend in self.preferred:
                try:
                    return self._run(backend, self.preferred[-1], args, kwargs)
                except Unsupported as error:
                    reasons.append(f"{backend.name}: {error}")
        raise Unsupported(f"{self.name}: no backend takes these arguments. " + "; ".join(reasons))

    @property
    def implementations(self) -> tuple[str, ...]:
        """Values of `implementation` in the public function."""
        return tuple(backend.name for backend in self.preferred + self.others)

    def used_here(self) -> str:
        """Name of the backend that `implementation=None` tries first on the default device."""
        device = devices.device_of(())
        return next(backend.name for backend in self.preferred if backend.runs_on(device))

    def function(self, backend: Backend, name: str | None = None) -> Callable[..., Any]:
        """A function of a backend's module, by default the operation itself."""
        return getattr(importlib.import_module(f"{self.package}.{backend.name}"), name or self.name)

    def has(self, backend: Backend, name: str) -> bool:
        """Whether a backend's module has a function of this name."""
        return hasattr(importlib.import_module(f"{self.package}.{backend.name}"), name)

    def _named(self, name: str) -> Backend:
        for backend in self.preferred + self.others:
            if backend.name == name:
                return backend
        raise ValueError(f"{self.name}: implementation must be None or one of {self.implementations}; got {name!r}.")

    def _run(self, backend: Backend, otherwise: Backend | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a backend, or `otherwise` if lowering is for a platform without the backend; None: lowering raises Unsupported."""
        open_device = backend.is_decided_when_lowered((args, kwargs))
        if backend.needs is None:
            return self.function(backend)(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        dynamic = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        static = tuple(None if d else leaf for d, leaf in zip(dynamic, leaves, strict=True))
        call = _Call(self, backend, otherwise, open_device, structure, static, tuple(dynamic))
        execute = _execute if self.gradients is None else _execute_differentiably
        return execute(call, *itertools.compress(leaves, dynamic))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call without its arrays, a static argument of jitted functions.

    Attributes:
      operation, backend: the function that runs.
      otherwise: backend for platforms without `backend`; None: lowering for these raises Unsupported.
      open_device: whether the platform is known only at lowering.
      structure, static: the arguments, with None in place of arrays.
      is_array: which leaves of the arguments are arrays.
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
        """Results whose lowering raises Unsupported."""
        results = jax.eval_shape(functools.partial(self.run, self.backend), *arrays)
        flat, structure = jax.tree.flatten(results)
        avals = tuple((x.shape, x.dtype) for x in flat)
        return jax.tree.unflatten(structure, _refuse_p.bind(avals=avals, requirement=self.backend.needs))


def _execute(call: _Call, *arrays: jax.Array) -> Any:
    return _choose_when_lowered(call, *arrays) if call.open_device else call.run(call.backend, *arrays)


# Jitted, so that the device of the arrays decides under an eager `jax.grad` or `jax.vmap` as well.
@functools.partial(jax.jit, static_argnums=0)
def _choose_when_lowered(call: _Call, *arrays: jax.Array) -> Any:
    default = call.refuse if call.otherwise is None else functools.partial(call.run, call.otherwise)
    return jax.lax.platform_dependent(*arrays, cuda=functools.partial(call.run, call.backend), default=default)


# The rule is outside the choice. Inside, JAX would differentiate both branches, and each would carry zeros for the other's residuals.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _execute_differentiably(call: _Call, *arrays: jax.Array) -> Any:
    return _execute(call, *arrays)


def _forward_rule(call: _Call, *arrays: jax.Array) -> tuple[Any, tuple]:
    results = _execute(call, *arrays)
    return results, (arrays, results if call.operation.gradients_use_results else None)


def _backward_rule(call: _Call, residuals: tuple, cotangents: Any) -> tuple:
    arrays, results = residuals
    before = (results,) if call.operation.gradients_use_results else ()
    differentiate = _differentiate_when_lowered if call.open_device else functools.partial(_differentiate, call.backend)
    gradients = differentiate(call, (*before, cotangents), *arrays)
    return *gradients, *(None,) * (len(arrays) - len(gradients))


def _differentiate(backend: Backend, call: _Call, operands: tuple, *arrays: jax.Array) -> tuple:
    """Gradients by a backend's function if it has one, otherwise by that of the last preferred backend."""
    operation, (args, kwargs) = call.operation, call.arguments(arrays)
    name, last = operation.gradients or "", operation.preferred[-1]
    function = operation.function(backend if operation.has(backend, name) else last, name)
    return function(*operands, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _differentiate_when_lowered(call: _Call, operands: tuple, *arrays: jax.Array) -> tuple:
    chosen, default = (
        functools.partial(_differentiate, backend, call) for backend in (call.backend, call.operation.preferred[-1])
    )
    if not call.operation.has(call.backend, call.operation.gradients or ""):
        return default(operands, *arrays)
    return jax.lax.platform_dependent(operands, *arrays, cuda=chosen, default=default)


_execute_differentiably.defvjp(_forward_rule, _backward_rule)

# Has no operands, and therefore needs no rules for gradients and vmap.
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

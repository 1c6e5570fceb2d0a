"""How an operation picks its implementation.

An operation is a folder. A backend of it is a module in that folder, named after the backend, holding a function named after the
operation that takes the arguments of the public function less `implementation`. It is imported when it is first asked for, so that a
GPU backend costs nothing where it cannot run.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

Implementation = Literal["reference", "xla", "mosaic_gpu"]


class Unsupported(NotImplementedError):
    """A backend cannot do what it is asked; another one may. Raised before any work is done."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """The backends of one operation.

    Args:
      name: name of the public function.
      package: the operation's folder, as a module name.
      preferred: backends that `implementation=None` tries, best first; the last one must do everything.
      others: backends that run only when they are named.
    """

    name: str
    package: str
    preferred: tuple[str, ...] = ("xla",)
    others: tuple[str, ...] = ("reference",)

    def __call__(self, implementation: str | None, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the named backend, or without a name the first preferred one that takes these arguments.

        Raises:
          ValueError: there is no backend of that name.
          Unsupported: the named backend, or every preferred one, cannot do this.
        """
        if implementation is not None:
            return self._load(implementation)(*args, **kwargs)
        reasons = []
        for backend in self.preferred:
            try:
                return self._load(backend)(*args, **kwargs)
            except Unsupported as error:
                reasons.append(f"{backend}: {error}")
        raise Unsupported(f"{self.name}: no backend can do this. " + "; ".join(reasons))

    def used_here(self) -> str:
        """The backend that `implementation=None` tries first on this machine's default device."""
        from pallas_kernels.devices import require_hopper  # which needs this module

        for backend in self.preferred[:-1]:
            try:
                require_hopper()  # all backends but the last are for Hopper GPUs
                return backend
            except Unsupported:
                continue
        return self.preferred[-1]

    def _load(self, backend: str) -> Callable[..., Any]:
        known = self.preferred + self.others
        if backend not in known:
            raise ValueError(f"{self.name}: implementation must be None or one of {known}; got {backend!r}.")
        return getattr(importlib.import_module(f"{self.package}.{backend}"), self.name)

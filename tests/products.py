"""Finds products that an accelerator would compute from rounded inputs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


def rounded_products(function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[str]:
    """The products of float32 arrays that leave their precision to the device: on NVIDIA GPUs TF32, 10 bits of each input.

    Read off the traced program, so that they are found on CPUs too, which compute in float32 whatever is asked for.
    """
    with jax.default_matmul_precision(None):  # pyright: ignore[reportArgumentType] - as users have it
        traced = jax.make_jaxpr(lambda *arguments: function(*arguments, **settings))(*arguments)
    return [str(equation) for equation in _products(traced.jaxpr) if not _is_exact(equation)]


def _products(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from _products(inner if isinstance(inner, Jaxpr) else inner.jaxpr)


def _is_exact(equation: Any) -> bool:
    """An outer product has no sum: XLA multiplies its elements in float32."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    rounds = any(x.aval.dtype == jnp.float32 for x in equation.invars)
    left_open = equation.params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)
    return not (rounds and contracted and left_open)

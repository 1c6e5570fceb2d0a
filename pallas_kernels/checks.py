"""Argument checks that the operations share. Messages say what must hold, what was passed, and the remedy if there is one."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32

BLOCK_SIZES = (16, 32, 64, 128)
_FLOATS = ("float32", "bfloat16", "float16")


def check_block_size(where: str, block_size: int) -> None:
    """Raises ValueError unless `block_size` is one of the supported sizes."""
    check_size(where, block_size, BLOCK_SIZES)


def check_size(where: str, block_size: Any, sizes: tuple[Any, ...]) -> None:
    """Raises ValueError unless `block_size` is one of `sizes`; 64.0 and True, which equal one, are none."""
    if not is_whole(block_size) or block_size not in sizes:
        raise ValueError(f"{where}: block_size must be one of {sizes} tokens; got {block_size!r}.")


def is_whole(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy; True and 2.0 are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(where: str, name: str, value: Any) -> None:
    """Raises ValueError unless a value is an integer of at least 1."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"{where}: {name} must be an integer of at least 1; got {value!r}.")


def check_arrays(where: str, **arrays: Any) -> None:
    """Raises ValueError unless each of these arguments is an array; None, one that is left out, is none of them."""
    for name, array in arrays.items():
        if array is not None:
            check_array(where, name, array)


def check_array(where: str, name: str, array: Any) -> None:
    """Raises ValueError unless `array` is one."""
    if not all(hasattr(array, attribute) for attribute in ("ndim", "shape", "dtype")):
        raise ValueError(f"{where}: {name} must be an array; got {type(array).__name__}. Convert it with jnp.asarray.")


def check_lists(where: str, blocks: Any) -> None:
    """Raises ValueError unless `blocks` is a `BlockIndices`."""
    if not all(hasattr(blocks, attribute) for attribute in ("counts", "indices", "block_size")):
        raise ValueError(
            f"{where}: blocks must be BlockIndices; got {type(blocks).__name__}. A mask becomes one by BlockIndices.from_mask."
        )


def check_shape(where: str, name: str, array: Any, expected: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has that shape; `expected` is the shape in letters."""
    if array.shape != shape:
        raise ValueError(f"{where}: {name} must have shape {expected} = {shape}; got {array.shape}.")


def check_integers(where: str, name: str, array: Any, expected: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` holds integers and has that shape."""
    check_array(where, name, array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{where}: {name} must hold integers; got {array.dtype}.")
    check_shape(where, name, array, expected, shape)


def integer_scalar(where: str, name: str, value: Any) -> tuple[Int32[Array, ""], int | None]:
    """One integer as an array, and its value, which inside JAX's transformations is not known: None. Raises ValueError if it is none."""
    value = jnp.asarray(value) if isinstance(value, int | float) else value
    check_integers(where, name, value, "[]", ())
    return jnp.asarray(value, jnp.int32), None if isinstance(value, Tracer) else int(value)


def check_range(where: str, name: str, array: Any, most: int, what: str) -> None:
    """Raises ValueError where a value is below 0 or above `most`; values inside JAX's transformations are not known."""
    if isinstance(array, Tracer):
        return
    values = np.asarray(array)
    if (wrong := values[(values < 0) | (values > most)]).size:
        raise ValueError(f"{where}: {name} must lie in [0, {most}], {what}; got {wrong.flat[0]}.")


def check_attention_inputs(where: str, q: Any, k: Any, v: Any, *, query_axes: str, same_batch: bool = True) -> None:
    """Raises ValueError unless q, k, v can attend to each other.

    Args:
      where: the operation, named in the message.
      q: [B, T, H, D] or [B, H, D], as `query_axes` says ("B T H D" or "B H D").
      k, v: [B, S, K, D].
      same_batch: whether B of k and v is that of q.
    """
    check_arrays(where, q=q, k=k, v=v)
    if q.ndim != len(query_axes.split()):
        raise ValueError(f"{where}: q must be [{query_axes.replace(' ', ', ')}]; got shape {q.shape}.")
    if k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"{where}: k and v must both be [B, S, K, D]; got {k.shape} and {v.shape}.")
    if q.shape[-1] != k.shape[-1] or (same_batch and q.shape[0] != k.shape[0]):
        axes = "B and D" if same_batch else "D"
        raise ValueError(f"{where}: q and k must agree in {axes}; got q {q.shape} and k {k.shape}.")
    if q.shape[-2] % k.shape[2]:
        raise ValueError(
            f"{where}: the number of query heads H must be a multiple of the key/value heads K; "
            f"got H={q.shape[-2]} and K={k.shape[2]}."
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{where}: no axis may be empty; got q {q.shape} and k {k.shape}.")
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
        raise ValueError(
            f"{where}: q, k and v must share one dtype out of {_FLOATS}; got {q.dtype}, {k.dtype} and {v.dtype}."
        )


def resolve_scale(where: str, scale: float | None, head_dim: int) -> float:
    """Returns the factor on the scores, 1 / sqrt(D) if None; raises ValueError unless it is finite."""
    factor = head_dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"{where}: scale must be a finite number; got {factor}.")
    return factor

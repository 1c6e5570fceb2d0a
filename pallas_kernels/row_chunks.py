"""Rows of lists, processed in chunks of rows whose lists are about equally long."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices

# Elements of a chunk's key tile and of its scores: the capacity of a CPU's cache; on other devices, enough to keep them busy.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**19, 2**25


def with_chunk_elements(function: Callable[..., Any], *operands: Any) -> Any:
    """function(elements of a chunk, *operands) for the device, which may be known only at lowering."""
    if devices.has_only_cpus():
        return function(_CPU_ELEMENTS, *operands)
    on_cpus, on_others = (functools.partial(function, n) for n in (_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS))
    return jax.lax.platform_dependent(*operands, cpu=on_cpus, default=on_others)


def scan_chunks(
    function: Callable[..., tuple[Any, Any]], carry: Any, rows: Any, *arrays: Any, rows_per_chunk: int
) -> tuple[Any, Any]:
    """Scans chunks of rows: function(carry, rows, *arrays) -> (carry, results).

    Chunks are gathered as they are needed, so that no sorted copy of the arrays exists.

    Args:
      function: gets the parts of `rows` and `arrays` that belong to a chunk. The last chunk is padded with rows of empty lists.
      carry: what the first call gets.
      rows: a named tuple of arrays over the rows, with the lengths of their lists in the field `counts`.
      arrays: others over the rows.
      rows_per_chunk: at most so many rows form a chunk.

    Returns:
      (carry of the last call, results of all rows in their order).
    """
    number = len(rows.counts)
    size = min(number, rows_per_chunk)
    order = jnp.pad(jnp.argsort(rows.counts), (0, -number % size), constant_values=number)

    def chunk(carry: Any, places: jax.Array) -> tuple[Any, Any]:
        counts = rows.counts.at[places].get(mode="fill", fill_value=0)
        own, *others = jax.tree.map(lambda x: x.at[places].get(mode="clip"), (rows, *arrays))
        return function(carry, own._replace(counts=counts), *others)

    carry, results = jax.lax.scan(chunk, carry, order.reshape(-1, size))
    inverse = jnp.argsort(order)[:number]
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[inverse], results)

"""Tiles that reach beyond the borders of an array in global memory, read and written number by number.

Pallas has no words for it, so it is written in MLIR, below Pallas. JAX's interpreter does not run such code: there, arrays come in
whole tiles, and the same is said with slices.
"""

from typing import Any

import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array

SCALAR = plgpu.Layout.WG_SPLAT(())


def store_inside(x: Array, ref: Any, *start: Array, layout: Any, interpreted: bool) -> None:
    """Writes a tile to `ref` from `start` on, as far as it lies within it.

    Args:
      x: in `layout`. Where a number is in several threads, each one writes it.
      ref: of as many axes as x.
    """
    if interpreted:
        ref[tuple(pl.ds(*place) for place in zip(start, x.shape, strict=True))] = x
        return
    types = layout, *(SCALAR for _ in start), plgpu.RefType()
    plgpu.inline_mgpu(arg_types=types)(_store_inside)(x, *start, ref)


def load_inside(ref: Any, *start: Array, shape: tuple[int, ...], layout: Any, interpreted: bool) -> Array:
    """A tile of `ref` from `start` on. What lies beyond the border is read from the border."""
    if interpreted:
        return ref[tuple(pl.ds(*place) for place in zip(start, shape, strict=True))]
    return _load(ref, *start, shape=shape, layout=layout, transposed=False)


def load_transposed(ref: Any, *, layout: Any, interpreted: bool) -> Array:
    """The transpose of `ref` [M, N]."""
    if interpreted:
        return ref[...].T
    return _load(ref, shape=ref.shape[::-1], layout=layout, transposed=True)


def _load(ref: Any, *start: Array, shape: tuple[int, ...], layout: Any, transposed: bool) -> Array:
    def load(ctx: mgpu.LaunchContext, *arguments: Any) -> mgpu.FragmentedArray:
        del ctx
        *first, source = arguments
        begin, size = [_index(x) for x in first], ir.MemRefType(source.type).shape
        index = ir.IndexType.get()
        last = [arith.constant(index, n - 1) for n in size]
        fragment = layout.to_mgpu()
        registers = np.empty(fragment.registers_shape(shape), dtype=object)
        width = fragment.vector_length
        for at, place in zip(np.ndindex(registers.shape), fragment.thread_idxs(shape), strict=True):
            numbers = []
            for i in range(width):
                here = [*place[:-1], arith.addi(place[-1], arith.constant(index, i))]
                here = here[::-1] if transposed else here
                if begin:
                    moved = (arith.addi(*x) for x in zip(begin, here, strict=True))
                    here = [arith.minui(*x) for x in zip(moved, last, strict=True)]
                numbers.append(memref.load(source, here))
            kind = ir.VectorType.get((width,), numbers[0].type)
            registers[at] = vector.from_elements(kind, numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None)

    types = *(SCALAR for _ in start), plgpu.RefType()
    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(load)(*start, ref)


def _store_inside(ctx: mgpu.LaunchContext, x: mgpu.FragmentedArray, *arguments: Any) -> None:
    del ctx
    *first, target = arguments
    begin, index = [_index(i) for i in first], ir.IndexType.get()
    ends = [arith.constant(index, size) for size in ir.MemRefType(target.type).shape]

    def store(value: ir.Value, place: tuple[ir.Value, ...]) -> None:
        here = [arith.addi(start, i) for start, i in zip(begin, place, strict=True)]
        inside = [arith.cmpi(arith.CmpIPredicate.ult, i, end) for i, end in zip(here, ends, strict=True)]
        both = inside[0]
        for one in inside[1:]:
            both = arith.andi(both, one)
        with mgpu.when(both):
            memref.store(value, target, here)

    x.foreach(store)


def _index(number: mgpu.FragmentedArray) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), number.registers.item())

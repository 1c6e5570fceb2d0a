"""Tiles that reach beyond the edge of an array in global memory, loaded and stored element by element.

Pallas has no masked loads and stores for Mosaic GPU, so these are written in MLIR. JAX's interpreter does not run MLIR: there, arrays
consist of whole tiles, which are sliced. A tile starts within the array, at a multiple of its size.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array

SCALAR = plgpu.Layout.WG_SPLAT(())


def store_transposed(x: Array, ref: Any, *, layout: Any, interpreted: bool) -> None:
    """Stores the part of a transposed tile that lies within `ref`."""
    if interpreted:
        ref[...] = x.T[tuple(slice(0, size) for size in ref.shape)]
        return
    store = functools.partial(_store_inside, transposed=True)
    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(store)(x, ref)


def store_inside(x: Array, ref: Any, *start: Array, layout: Any, interpreted: bool) -> None:
    """Stores the part of a tile that lies within `ref`.

    Args:
      x: the tile, in `layout`. Every thread that holds an element stores it.
      ref: array with the axes of x.
      start: index of the tile's first element; zeros if left out.
    """
    if interpreted:
        if start:
            ref[tuple(pl.ds(*axis) for axis in zip(start, x.shape, strict=True))] = x
        else:
            ref[...] = x[tuple(slice(0, size) for size in ref.shape)]
        return
    types = layout, *(SCALAR for _ in start), plgpu.RefType()
    plgpu.inline_mgpu(arg_types=types)(_store_inside)(x, *start, ref)


def load_inside(ref: Any, *start: Array, shape: tuple[int, ...], layout: Any, interpreted: bool) -> Array:
    """Loads a tile of `ref` from `start` on. Elements beyond the edge are copies of those at the edge."""
    if interpreted:
        return ref[tuple(pl.ds(*axis) for axis in zip(start, shape, strict=True))]
    return _load(ref, *start, shape=shape, layout=layout, transposed=False)


def load_transposed(ref: Any, *, layout: Any, interpreted: bool) -> Array:
    """Loads the transpose of `ref` [M, N]."""
    if interpreted:
        return ref[...].T
    return _load(ref, shape=ref.shape[::-1], layout=layout, transposed=True)


def _load(ref: Any, *start: Array, shape: tuple[int, ...], layout: Any, transposed: bool) -> Array:
    def load(ctx: mgpu.LaunchContext, *arguments: Any) -> mgpu.FragmentedArray:
        del ctx
        *first, source = arguments
        fragment, size = layout.to_mgpu(), ir.MemRefType(source.type).shape
        indices = _Indices(fragment, shape, first)
        registers = np.empty(fragment.registers_shape(shape), dtype=object)
        for register in np.ndindex(registers.shape):
            elements = []
            for i in range(fragment.vector_length):
                index = indices.of(register, i)
                if first:
                    index = [
                        x if whole else arith.minui(x, _constant(n - 1))
                        for x, n, whole in zip(index, size, indices.whole(size), strict=True)
                    ]
                elements.append(memref.load(source, index[::-1] if transposed else index))
            registers[register] = vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)
        return mgpu.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None)

    types = *(SCALAR for _ in start), plgpu.RefType()
    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(load)(*start, ref)


def _store_inside(ctx: mgpu.LaunchContext, x: mgpu.FragmentedArray, *arguments: Any, transposed: bool = False) -> None:
    del ctx
    layout: Any = x.layout
    *first, target = arguments
    order = -1 if transposed else 1
    size = ir.MemRefType(target.type).shape[::order]
    indices = _Indices(layout, x.shape, first)
    for register in np.ndindex(x.registers.shape):
        for i in range(layout.vector_length):
            value = vector.extract(x.registers[register], dynamic_position=[], static_position=[i])
            index = indices.of(register, i)
            inside = [
                arith.cmpi(arith.CmpIPredicate.ult, x, _constant(n))
                for x, n, whole in zip(index, size, indices.whole(size), strict=True)
                if not whole
            ]
            if inside:
                with mgpu.when(functools.reduce(arith.andi, inside)):
                    memref.store(value, target, index[::order])
            else:
                memref.store(value, target, index[::order])


class _Indices:
    """Indices of the elements of a tile that a thread holds: an index of the thread plus constants."""

    def __init__(self, layout: mgpu.TiledLayout, shape: tuple[int, ...], start: Sequence[mgpu.FragmentedArray]):
        self._shape = shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self._strides, self._tile_strides = strides, layout.tiling.tile_strides(strides)
        mine = _first_index(layout, len(shape))
        begin = [arith.index_cast(ir.IndexType.get(), x.registers.item()) for x in start]
        self._mine = [arith.addi(*x) for x in zip(begin, mine, strict=True)] if begin else mine

    def of(self, register: tuple[int, ...], i: int) -> list[ir.Value]:
        """Index of element i of a register."""
        rest = sum(n * stride for n, stride in zip(register, self._tile_strides, strict=True))
        offset = []
        for stride in self._strides:
            offset.append(rest // stride)
            rest %= stride
        offset[-1] += i
        return [arith.addi(x, _constant(n)) for x, n in zip(self._mine, offset, strict=True)]

    def whole(self, size: Sequence[int]) -> list[bool]:
        """The axes along which an array of that size consists of whole tiles."""
        return [n % tile == 0 for n, tile in zip(size, self._shape, strict=True)]


def _first_index(layout: mgpu.TiledLayout, axes: int) -> list[ir.Value]:
    """Row and column, or row, of the first element that this thread holds of a tile in the layout of a matrix product.

    `layout.thread_idxs` returns the same, but the compiler hoists its computation and keeps the results in registers that loops in
    between need. Volatile assembly stays where it is.
    """
    assert layout in (mgpu.WGMMA_LAYOUT, mgpu.WGMMA_ROW_LAYOUT)
    i32 = ir.IntegerType.get_signless(32)
    thread = utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)

    def bits(first: int, count: int) -> ir.Value:
        shifted = arith.shrui(thread, arith.constant(i32, first))
        return arith.andi(shifted, arith.constant(i32, 2**count - 1))

    row = arith.addi(arith.muli(bits(5, 2), arith.constant(i32, 16)), bits(2, 3))
    column = arith.muli(bits(0, 2), arith.constant(i32, 2))
    return [arith.index_castui(ir.IndexType.get(), x) for x in (row, column)[:axes]]


def _constant(value: int) -> ir.Value:
    return arith.constant(ir.IndexType.get(), value)

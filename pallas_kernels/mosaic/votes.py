"""Votes among the threads of a warpgroup, which must take a branch together: matrix products are its common instructions."""

import functools
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array

from pallas_kernels.mosaic.flash_tiles import ROW_VECTOR

_SPLAT = plgpu.Layout.WG_SPLAT(())


def any_row(votes: Array, interpret: Any) -> Array:
    """1 if any of the votes [64] of a tile's rows, 0 or 1, is 1, otherwise 0; int32, the same in every thread of the warpgroup.

    A reduction in Pallas would pass through shared memory and wait at two barriers; a barrier can count votes itself.
    """
    if interpret:
        return votes.max()
    result = plgpu.ShapeDtypeStruct((), votes.dtype, layout=_SPLAT)
    return plgpu.inline_mgpu(arg_types=(ROW_VECTOR,), return_type=result)(_vote)(votes)


def _vote(ctx: mgpu.LaunchContext, votes: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    del ctx
    i1, i32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
    mine = functools.reduce(
        arith.ori,
        [vector.extract(x, dynamic_position=[], static_position=[0]) for x in votes.registers.flat],
    )
    voted = arith.cmpi(arith.CmpIPredicate.ne, mine, arith.constant(i32, 0))
    result = utils.inline_ptx(
        f"bar.red.or.pred $0, $1, {utils.WARPGROUP_SIZE}, $2;",
        utils.warpgroup_barrier_idx(sync=False),  # the barrier of this warpgroup's other synchronization
        voted,
        result_types=i1,
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(arith.extui(i32, result), (), is_signed=True)

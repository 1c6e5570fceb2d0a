"""Strips: memory that a warpgroup has to itself while it runs, one out of a pool that is as large as the device needs.

A CTA's number says nothing about when it runs, and its multiprocessor may not tell enough either; so a warpgroup takes a strip that is
free by an atomic exchange, and gives it back. Which one it gets has no influence on results.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref
from jaxtyping import Array

from pallas_kernels.devices import local_gpus
from pallas_kernels.mosaic.edge_tiles import SCALAR

_MULTIPROCESSORS = 132  # of an H100 or H200; on a device with more, warpgroups wait for each other's strips
_THREADS = 128  # of a warpgroup

# The search begins at a place of the multiprocessor's own, which is free as a rule, and whose strip is in its caches.
_TAKE = """{{
.reg .pred taken;
.reg .b32 strip, before;
.reg .b64 place;
mov.u32 strip, %smid;
mad.lo.u32 strip, strip, 2, $2;
SEARCH:
rem.u32 strip, strip, {pool};
mad.wide.u32 place, strip, 4, $1;
atom.acquire.gpu.global.cas.b32 before, [place], 0, 1;
setp.ne.b32 taken, before, 0;
@taken add.u32 strip, strip, 1;
@taken bra SEARCH;
mov.u32 $0, strip;
}}"""
_GIVE_BACK = """{
.reg .b64 place;
mad.wide.u32 place, $1, 4, $0;
st.release.gpu.global.b32 [place], 0;
}"""


def pool_size(ctas: int, warpgroups: int, *, interpreted: bool) -> int:
    """How many strips there must be for so many CTAs of so many warpgroups, one CTA at a time on each multiprocessor."""
    if interpreted:  # without atomic exchange, each has its own
        return ctas * warpgroups
    multiprocessors = max((gpu.core_count for gpu in local_gpus()), default=_MULTIPROCESSORS)
    return warpgroups * min(ctas, multiprocessors)


def take_strip(taken_ref: Any, note_ref: Any, cta: Array, warpgroup: Array, *, interpreted: bool) -> Array:
    """Number of a strip that nobody else has.

    Args:
      taken_ref: [pool] in global memory, int32: 0 where a strip is free.
      note_ref: [1] in shared memory, int32, of this warpgroup: it passes the number from one thread to the others.
      cta, warpgroup: whose; warpgroup is 0 or 1.
    """
    if interpreted:
        return 2 * cta + warpgroup
    types = plgpu.RefType(), plgpu.RefType(), SCALAR
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_take)(taken_ref, note_ref, warpgroup)


def give_back_strip(taken_ref: Any, strip: Array, *, interpreted: bool) -> None:
    """Lets others have it. Nothing in it is read or written by this warpgroup from here on."""
    if not interpreted:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))(_give_back)(taken_ref, strip)


def _take(
    ctx: mgpu.LaunchContext, taken: ir.Value, note: ir.Value, warpgroup: mgpu.FragmentedArray
) -> mgpu.FragmentedArray:
    del ctx
    i32, first = ir.IntegerType.get_signless(32), arith.constant(ir.IndexType.get(), 0)
    search = _TAKE.format(pool=ir.MemRefType(taken.type).shape[0])
    with mgpu.when(_one_thread()):
        arguments = utils.memref_ptr(taken), warpgroup.registers.item()
        strip = utils.inline_ptx(search, *arguments, result_types=i32, has_side_effects=True)
        memref.store(strip, note, [first])
    mgpu.warpgroup_barrier()
    return mgpu.FragmentedArray.splat(memref.load(note, [first]), (), is_signed=True)


def _give_back(ctx: mgpu.LaunchContext, taken: ir.Value, strip: mgpu.FragmentedArray) -> None:
    del ctx
    mgpu.warpgroup_barrier()
    with mgpu.when(_one_thread()):
        utils.inline_ptx(_GIVE_BACK, utils.memref_ptr(taken), strip.registers.item(), has_side_effects=True)


def _one_thread() -> ir.Value:
    """Whether this is the first thread of its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    place = arith.remui(mgpu.thread_idx(), arith.constant(i32, _THREADS))
    return arith.cmpi(arith.CmpIPredicate.eq, place, arith.constant(i32, 0))

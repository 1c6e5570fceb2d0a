"""Workspace slots: global memory for a warpgroup while it runs, out of as many slots as warpgroups run at a time.

The index of a CTA does not tell when it runs, and that of its multiprocessor is not enough to choose a slot. So a warpgroup takes a
free slot by atomic compare-and-swap and gives it back at its end. Results do not depend on which slot it gets.
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

_MULTIPROCESSORS = 132  # of an H100 or H200; with more, warpgroups wait for free slots
_THREADS = 128  # threads of a warpgroup

# The search starts at the multiprocessor's own slot, which is usually free and in its cache.
_TAKE = """{{
.reg .pred taken;
.reg .b32 slot, before;
.reg .b64 address;
mov.u32 slot, %smid;
mad.lo.u32 slot, slot, 2, $2;
SEARCH:
rem.u32 slot, slot, {slots};
mad.wide.u32 address, slot, 4, $1;
atom.acquire.gpu.global.cas.b32 before, [address], 0, 1;
setp.ne.b32 taken, before, 0;
@taken add.u32 slot, slot, 1;
@taken bra SEARCH;
mov.u32 $0, slot;
}}"""
_GIVE_BACK = """{
.reg .b64 address;
mad.wide.u32 address, $1, 4, $0;
st.release.gpu.global.b32 [address], 0;
}"""


def num_slots(ctas: int, warpgroups: int, *, interpreted: bool) -> int:
    """Number of slots for CTAs of `warpgroups` warpgroups, one CTA at a time on each multiprocessor."""
    if interpreted:
        # The interpreter has no atomic operations: each warpgroup has its own slot.
        return ctas * warpgroups
    multiprocessors = max((gpu.core_count for gpu in local_gpus()), default=_MULTIPROCESSORS)
    return warpgroups * min(ctas, multiprocessors)


def take_slot(taken_ref: Any, mailbox_ref: Any, cta: Array, warpgroup: Array, *, interpreted: bool) -> Array:
    """Takes a free slot and returns its index.

    Args:
      taken_ref: [slots] in global memory, int32: 0 for free slots.
      mailbox_ref: [1] in shared memory, int32, of this warpgroup: passes the index from one thread to the others.
      cta, warpgroup: indices of this warpgroup, the latter 0 or 1.
    """
    if interpreted:
        return 2 * cta + warpgroup
    types = plgpu.RefType(), plgpu.RefType(), SCALAR
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_take)(taken_ref, mailbox_ref, warpgroup)


def give_back_slot(taken_ref: Any, slot: Array, *, interpreted: bool) -> None:
    """Frees a slot, which this warpgroup must not read or write afterwards."""
    if not interpreted:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))(_give_back)(taken_ref, slot)


def _take(
    ctx: mgpu.LaunchContext, taken: ir.Value, mailbox: ir.Value, warpgroup: mgpu.FragmentedArray
) -> mgpu.FragmentedArray:
    del ctx
    i32, first = ir.IntegerType.get_signless(32), arith.constant(ir.IndexType.get(), 0)
    search = _TAKE.format(slots=ir.MemRefType(taken.type).shape[0])
    with mgpu.when(_one_thread()):
        arguments = utils.memref_ptr(taken), warpgroup.registers.item()
        slot = utils.inline_ptx(search, *arguments, result_types=i32, has_side_effects=True)
        memref.store(slot, mailbox, [first])
    mgpu.warpgroup_barrier()
    return mgpu.FragmentedArray.splat(memref.load(mailbox, [first]), (), is_signed=True)


def _give_back(ctx: mgpu.LaunchContext, taken: ir.Value, slot: mgpu.FragmentedArray) -> None:
    del ctx
    mgpu.warpgroup_barrier()
    with mgpu.when(_one_thread()):
        utils.inline_ptx(_GIVE_BACK, utils.memref_ptr(taken), slot.registers.item(), has_side_effects=True)


def _one_thread() -> ir.Value:
    """Whether this is the first thread of its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    index = arith.remui(mgpu.thread_idx(), arith.constant(i32, _THREADS))
    return arith.cmpi(arith.CmpIPredicate.eq, index, arith.constant(i32, 0))

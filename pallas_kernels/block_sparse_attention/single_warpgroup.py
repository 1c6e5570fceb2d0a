"""The kernel of `block_sparse_attention` whose CTAs are single warpgroups: see README.md beside this."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse_attention.query_tiles import BlockList, InputRefs, QueryTile, Sizes, write_results
from pallas_kernels.mosaic.flash_tiles import QUERIES, Softmax, accumulate, columns, i32, product, tile


@dataclasses.dataclass(frozen=True)
class SingleWarpgroup:
    """Each CTA is one warpgroup, which walks one list and loads its own tiles; four CTAs share a multiprocessor and hide each other's
    waits."""


def single_warpgroup_kernel(sizes: Sizes, c: float, interpret: Any, dtype: Any) -> Callable:
    b = sizes.block_size

    def kernel(*arguments: Any) -> None:
        refs, (*result_refs, q_tile, k_tile, v_tile, lse_row, q_ready, k_ready, v_ready) = InputRefs.of(
            sizes, arguments
        )
        sequence, kv_head, in_group, block = sizes.work_of(lax.axis_index("cta"), sizes.rows, sizes.group)
        queries = QueryTile(sequence, kv_head * sizes.group + in_group, kv_head, block * QUERIES, block)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, q_ready)
        blocks = BlockList.read(sizes, refs, queries)
        first, row = blocks.entry(0), refs.cache_row(sequence)

        def load_k(t: Array, key_block: Array) -> None:
            @pl.when(t < blocks.count)
            def _():
                plgpu.copy_gmem_to_smem(refs.k.at[row, pl.ds(key_block * b, b), kv_head], k_tile, k_ready)

        def load_v(t: Array, key_block: Array) -> None:
            @pl.when(t < blocks.count)
            def _():
                refs.load_values(queries, key_block, blocks, v_tile, v_ready)

        load_k(i32(0), first)
        load_v(i32(0), first)
        plgpu.barrier_wait(q_ready)

        def step(carry: tuple[Array, Array, Softmax], *, masked: bool) -> tuple[Array, Array, Softmax]:
            """Adds key block `key_block`, entry t of the list, to the softmax."""
            t, key_block, state = carry
            # Read early, since it comes from L2.
            following = blocks.entry(jnp.minimum(t + 1, blocks.width - 1))
            plgpu.barrier_wait(k_ready)
            scores = product(q_tile, k_tile)
            load_k(t + 1, following)
            if masked:
                scores = blocks.mask(scores, key_block * b)
            maximum, total, weights, factor = state.add(scores, c)
            out, weights = state.out * columns(factor, state.out), weights.astype(dtype)
            if not interpret:
                # The compiler would move these behind the wait, where nothing hides their time.
                out, total, maximum, weights = lax.optimization_barrier((out, total, maximum, weights))
            plgpu.barrier_wait(v_ready)
            out = accumulate(out, weights, v_tile, interpret)
            load_v(t + 1, following)
            return t + 1, following, Softmax(out, maximum, total)

        def unmasked(carry: tuple[Array, Array, Softmax]) -> Array:
            return (carry[0] < blocks.count) & blocks.sees_all(carry[1], b)

        # Lists ascend: the blocks that every query sees in full come first, and need no mask.
        carry = i32(0), first, Softmax.empty(sizes.head_dim)
        carry = lax.while_loop(unmasked, functools.partial(step, masked=False), carry)
        carry = lax.while_loop(lambda carry: carry[0] < blocks.count, functools.partial(step, masked=True), carry)
        write_results(queries, blocks, carry[2], q_tile, lse_row, result_refs)

    return plgpu.kernel(
        kernel,
        out_type=sizes.outputs(dtype, sizes.rows * QUERIES),
        scratch_types=[
            *(tile(rows, sizes.head_dim, dtype) for rows in (QUERIES, b, b)),
            plgpu.SMEM((QUERIES,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        grid=(sizes.batch * sizes.heads * sizes.rows,),
        grid_names=("cta",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )

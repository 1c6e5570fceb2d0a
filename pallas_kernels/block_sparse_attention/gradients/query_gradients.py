"""The gradient of queries on Hopper GPUs: one warpgroup per 64 queries walks their list of key blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse_attention.query_tiles import BlockList, InputRefs, QueryTile, Sizes
from pallas_kernels.mosaic.flash_tiles import (
    LOG2_E,
    MATRIX,
    QUERIES,
    ROW_VECTOR,
    accumulate,
    accumulator,
    columns,
    i32,
    product,
    tile,
)

KEYS = 64  # keys of a tile; a block of 128 is two


def query_gradients_kernel(sizes: Sizes, scale: float, interpret: Any, dtype: Any, stages: int = 1) -> Callable:
    """(q, k, v, counts, indices, offsets, d_out, statistics) -> d_q; see mosaic_gpu.py beside this."""
    c, per_block = scale * LOG2_E, sizes.block_size // KEYS

    def kernel(*arguments: Any) -> None:
        refs, (d_out_ref, statistics_ref, d_q_ref, *scratch) = InputRefs.of(sizes, arguments)
        q_tile, d_out_tile, statistics, k_tiles, v_tiles, queries_ready, k_ready, v_ready = scratch
        place = sizes.work_of(lax.axis_index("cta"), sizes.rows * per_block, sizes.group)
        sequence, kv_head, in_group, query_tile = place
        list_row = lax.div(query_tile, i32(per_block))
        queries = QueryTile(sequence, kv_head * sizes.group + in_group, kv_head, query_tile * QUERIES, list_row)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, queries_ready)
        plgpu.copy_gmem_to_smem(queries.of(d_out_ref), d_out_tile, queries_ready)
        plgpu.copy_gmem_to_smem(statistics_ref.at[sequence, queries.head, query_tile], statistics, queries_ready)
        blocks = BlockList.read(sizes, refs, queries)
        count = blocks.count * per_block

        def entry(t: Array) -> Array:
            """Key tile t of the list, or any number beyond its end."""
            block = blocks.entry(jnp.minimum(lax.div(t, i32(per_block)), blocks.width - 1))
            return block * per_block + lax.rem(t, i32(per_block))

        def load(ref: Any, tiles: Any, ready: Any, t: Array, key_tile: Array) -> None:
            @pl.when(t < count)
            def _():
                slot = lax.rem(t, i32(stages))
                keys = ref.at[sequence, pl.ds(key_tile * KEYS, KEYS), kv_head]
                plgpu.copy_gmem_to_smem(keys, tiles.at[slot], ready.at[slot])

        listed = [entry(i32(stage)) for stage in range(stages)]
        for stage, key_tile in enumerate(listed):
            load(refs.k, k_tiles, k_ready, i32(stage), key_tile)
            load(refs.v, v_tiles, v_ready, i32(stage), key_tile)
        plgpu.barrier_wait(queries_ready)
        lse, delta = (plgpu.load(statistics.at[i], layout=ROW_VECTOR) for i in range(2))

        def step(carry: tuple, *, masked: bool) -> tuple:
            t, (key_tile, *listed), d_q = carry
            following = entry(t + stages)  # read early, since it comes from L2
            slot = lax.rem(t, i32(stages))
            if not interpret:
                # With constant addresses, the descriptors of all operands would stay in registers and cost a CTA of three.
                slot = lax.optimization_barrier(slot)
            k_tile, v_tile = k_tiles.at[slot], v_tiles.at[slot]
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def weigh(scores: Array) -> Array:
                exponents = scores * c - columns(lse, scores)
                return jnp.exp2(blocks.mask(exponents, key_tile * KEYS) if masked else exponents)

            def next_values() -> None:
                load(refs.v, v_tiles, v_ready, t + stages, following)

            def differentiate(weights: Array, d_weights: Array) -> Array:
                return (weights * (d_weights - columns(delta, weights))).astype(dtype)

            if interpret:
                weights = weigh(product(q_tile, k_tile))
                d_scores = differentiate(weights, product(d_out_tile, v_tile))
                next_values()
                d_q = accumulate(d_q, d_scores, k_tile, interpret)
            else:

                def overlapped(scores_ref: Any, d_weights_ref: Any) -> Array:
                    plgpu.wgmma(scores_ref, q_tile, k_tile.transpose((1, 0)))
                    plgpu.wgmma(d_weights_ref, d_out_tile, v_tile.transpose((1, 0)))
                    weights = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
                    d_weights = d_weights_ref[...]
                    next_values()
                    return differentiate(weights, d_weights)

                shapes = [accumulator((QUERIES, KEYS), jnp.float32)] * 2
                d_q = accumulate(d_q, pl.run_scoped(overlapped, *shapes), k_tile, interpret)
            load(refs.k, k_tiles, k_ready, t + stages, following)
            return t + 1, (*listed, following), d_q

        def unmasked(carry: tuple) -> Array:
            return (carry[0] < count) & blocks.sees_all(carry[1][0], KEYS)

        zero = plgpu.layout_cast(jnp.full((QUERIES, sizes.head_dim), 0, jnp.float32), MATRIX)
        carry = i32(0), tuple(listed), zero
        # Lists ascend: the tiles that every query sees in full come first, and need no mask.
        carry = lax.while_loop(unmasked, lambda carry: step(carry, masked=False), carry)
        carry = lax.while_loop(lambda carry: carry[0] < count, lambda carry: step(carry, masked=True), carry)
        q_tile[...] = (carry[2] * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, queries.of(d_q_ref))
        plgpu.wait_smem_to_gmem(0)

    queries = sizes.batch, sizes.num_queries, sizes.heads, sizes.head_dim
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(queries, dtype),
        scratch_types=[
            tile(QUERIES, sizes.head_dim, dtype),
            tile(QUERIES, sizes.head_dim, dtype),
            plgpu.SMEM((2, QUERIES), jnp.float32),
            tile(stages, KEYS, sizes.head_dim, dtype),
            tile(stages, KEYS, sizes.head_dim, dtype),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(sizes.batch * sizes.heads * sizes.rows * per_block,),
        grid_names=("cta",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )

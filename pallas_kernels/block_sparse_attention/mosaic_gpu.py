"""`block_sparse_attention` for Hopper GPUs, in Pallas Mosaic GPU. README.md beside this explains the two kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.backends import Unsupported
from pallas_kernels.block_sparse_attention.gradients.mosaic_gpu import TOKENS, gradients
from pallas_kernels.block_sparse_attention.query_tiles import Sizes
from pallas_kernels.block_sparse_attention.single_warpgroup import SingleWarpgroup, single_warpgroup_kernel
from pallas_kernels.block_sparse_attention.skipping import log_threshold
from pallas_kernels.block_sparse_attention.warp_specialized import Sharing, WarpSpecialized, warp_specialized_kernel
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.flash_tiles import LOG2_E, QUERIES, positive_scale

Config = SingleWarpgroup | WarpSpecialized

CONFIGS: dict[str, Config] = {
    "single-warpgroup": SingleWarpgroup(),
    "own-lists": WarpSpecialized(Sharing.NONE, v_stages=1),
    "shared-by-heads": WarpSpecialized(Sharing.HEADS),
    "shared-by-queries": WarpSpecialized(Sharing.QUERIES),
}
# README.md has the measurements behind both.
DENSE = 0.75  # density from which wider tiles gain more than additional CTAs
SHORT = 32  # blocks up to which a list ends before warp specialization pays


def choose_config(
    heads: int, kv_heads: int, lists: int, block_size: int, num_key_blocks: int, density: float | None, skips: bool
) -> Config:
    """The fastest kernel for lists of this kind.

    `density` is the density that the caller expects, None if unknown. `skips`: only warp-specialized kernels skip blocks.
    """
    if block_size == 128:
        return CONFIGS["shared-by-queries"]
    if lists <= kv_heads and heads // kv_heads % 2 == 0:
        short = not skips and density is not None and density * num_key_blocks <= SHORT
        return CONFIGS["single-warpgroup" if short else "shared-by-heads"]
    if skips:
        return CONFIGS["own-lists"]
    return CONFIGS["own-lists" if density is not None and density >= DENSE else "single-warpgroup"]


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None,
    padded: bool,
    skip_threshold: Float32[Array, "H"] | None = None,
    cache_rows: Int[Array, "B"] | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], Int32[Array, "B H tiles"] | None]:
    """See the function of this name in api.py.

    Args:
      config: the kernel and its parameters; None for the choice of `choose_config`.
    """
    _check_inputs(q, blocks)
    heads, kv_heads, lists = q.shape[2], k.shape[2], blocks.counts.shape[1]
    skips = skip_threshold is not None
    config = config or choose_config(
        heads, kv_heads, lists, blocks.block_size, -(-k.shape[1] // blocks.block_size), density, skips
    )
    if skips and isinstance(config, SingleWarpgroup):
        raise Unsupported("must have a WarpSpecialized config for skip_threshold; got SingleWarpgroup().")
    _check_config(config, heads // kv_heads, lists <= kv_heads, blocks.block_size)
    others = query_offset, lengths, skip_threshold, cache_rows
    return _attend(config, scale, padded, interpreter(), q, k, v, blocks, *others)


def block_sparse_attention_gradients(
    results: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], None],
    cotangents: tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], None],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None,
    padded: bool,
    skip_threshold: None = None,
    cache_rows: None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Gradients in q, k and v, from the results (out, lse, None) of any implementation and the gradients in those."""
    _check_inputs(q, blocks)
    rest = dict(scale=scale, query_offset=query_offset, lengths=lengths, padded=padded, interpret=interpreter())
    return gradients(results[:2], cotangents[:2], q, k, v, blocks, **rest)


def _check_inputs(q: Float[Array, "B T H D"], blocks: BlockIndices) -> None:
    """Raises Unsupported for what the kernels do not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {q.dtype}.")
    if q.shape[-1] not in (64, 128):
        raise Unsupported(f"takes head dims 64 and 128; got {q.shape[-1]}.")
    if blocks.block_size not in (64, 128):
        raise Unsupported(f"takes blocks of 64 and 128 tokens; got {blocks.block_size}.")


def _check_config(config: Config, group: int, shared_lists: bool, block_size: int) -> None:
    sharing = config.sharing if isinstance(config, WarpSpecialized) else Sharing.NONE
    if (sharing is Sharing.QUERIES) != (block_size == 128):
        raise Unsupported(f"must take Sharing.QUERIES for blocks of 128 tokens, and only for those; got {config}.")
    if sharing is Sharing.HEADS and not (shared_lists and group % 2 == 0):
        raise Unsupported(
            f"must have lists shared by an even number of query heads for Sharing.HEADS; got groups of {group}."
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(
    config: Config,
    scale: float,
    padded: bool,
    interpret: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    skip_threshold: Float32[Array, "H"] | None,
    cache_rows: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"], Int32[Array, "B H tiles"] | None]:
    q, scale = positive_scale(q, scale)
    num_queries = q.shape[1]
    optional = (_edge_values(v, lengths, blocks.block_size, cache_rows),) if padded else ()
    if skip_threshold is not None:
        optional += (log_threshold(skip_threshold) * LOG2_E,)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0))) for x in (q, k, v))
    batch, padded_queries, heads, head_dim = q.shape
    _, lists, rows = blocks.counts.shape
    sizes = Sizes(
        batch,
        padded_queries,
        heads,
        head_dim,
        k.shape[2],
        lists,
        rows,
        blocks.block_size,
        padded,
        skips=skip_threshold is not None,
        real_queries=num_queries,
    )
    c = scale * LOG2_E
    if isinstance(config, SingleWarpgroup):
        kernel = single_warpgroup_kernel(sizes, c, interpret, q.dtype)
    else:
        kernel = warp_specialized_kernel(sizes, config, c, interpret, q.dtype)
    rows_read = () if cache_rows is None else (cache_rows,)
    offsets = jnp.stack([query_offset, lengths, *rows_read], axis=1)
    out, lse, *kept = kernel(q, k, v, blocks.counts, blocks.indices, offsets, *optional)
    tiles = -(-num_queries // QUERIES)
    return out[:, :num_queries], lse[:, :, :num_queries].transpose(0, 2, 1), kept[0][..., :tiles] if kept else None


def _edge_values(
    v: Float[Array, "P S K D"], lengths: Int[Array, "B"], b: int, cache_rows: Int[Array, "B"] | None
) -> Float[Array, "B b K D"]:
    """See `InputRefs.edge`. A copy of one block: the whole array would take as long as a tenth of the kernel."""
    start = jnp.maximum(lengths - 1, 0) // b * b
    position = start[:, None] + jnp.arange(b)[None]
    row = jnp.arange(len(lengths)) if cache_rows is None else cache_rows
    block = v[row[:, None], jnp.minimum(position, v.shape[1] - 1)]
    return jnp.where((position < lengths[:, None])[..., None, None], block, 0)

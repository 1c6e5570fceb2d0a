"""`block_sparse_attention` for Hopper GPUs, in Pallas Mosaic GPU. README.md beside this explains the two kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Unsupported
from pallas_kernels.block_sparse_attention.ring import Ring, Sharing, ring_kernel
from pallas_kernels.block_sparse_attention.solo import Solo, solo_kernel
from pallas_kernels.block_sparse_attention.tile import Shape
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.flash_tiles import LOG2_E, positive_scale

TOKENS = 8  # the copy engine takes tokens in groups of so many

Config = Solo | Ring

CONFIGS: dict[str, Config] = {
    "solo": Solo(),
    "own": Ring(Sharing.NONE, v_slots=1),
    "heads": Ring(Sharing.HEADS),
    "queries": Ring(Sharing.QUERIES),
}
# The evidence for both is in README.md.
DENSE = 0.75  # from this density on, wider tiles pay more than more CTAs
SHORT = 32  # lists of at most so many blocks are over before a ring pays


def choose_config(
    heads: int, kv_heads: int, lists: int, block_size: int, num_key_blocks: int, density: float | None
) -> Config:
    """The fastest kernel for lists of this kind. `density` is what the caller expects, None if nothing."""
    if block_size == 128:
        return CONFIGS["queries"]
    if lists <= kv_heads and heads // kv_heads % 2 == 0:
        short = density is not None and density * num_key_blocks <= SHORT
        return CONFIGS["solo" if short else "heads"]
    return CONFIGS["own" if density is not None and density >= DENSE else "solo"]


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None,
    config: Config | None = None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    """See the function of this name in api.py.

    Args:
      config: which kernel; None for what `choose_config` says.
    """
    (_, _, heads, head_dim), kv_heads, lists = q.shape, k.shape[2], blocks.counts.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {q.dtype}.")
    if head_dim not in (64, 128):
        raise Unsupported(f"takes head dims 64 and 128; got {head_dim}.")
    if blocks.block_size not in (64, 128):
        raise Unsupported(f"takes blocks of 64 and 128 tokens; got {blocks.block_size}.")
    config = config or choose_config(
        heads, kv_heads, lists, blocks.block_size, -(-k.shape[1] // blocks.block_size), density
    )
    _check_config(config, heads // kv_heads, lists <= kv_heads, blocks.block_size)
    return _attend(config, scale, interpreter(), q, k, v, blocks, query_offset, lengths)


def _check_config(config: Config, group: int, shared_lists: bool, block_size: int) -> None:
    sharing = config.sharing if isinstance(config, Ring) else Sharing.NONE
    if (sharing is Sharing.QUERIES) != (block_size == 128):
        raise Unsupported(f"Sharing.QUERIES is for blocks of 128 tokens, and nothing else is; got {config}.")
    if sharing is Sharing.HEADS and not (shared_lists and group % 2 == 0):
        raise Unsupported(f"Sharing.HEADS needs lists shared by an even number of query heads; got groups of {group}.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(
    config: Config,
    scale: float,
    interpret: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    q, scale = positive_scale(q, scale)
    num_queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0))) for x in (q, k, v))
    batch, padded, heads, head_dim = q.shape
    _, lists, rows = blocks.counts.shape
    shape = Shape(batch, padded, heads, head_dim, k.shape[2], lists, rows, blocks.block_size)
    c = scale * LOG2_E
    if isinstance(config, Solo):
        kernel = solo_kernel(shape, c, interpret, q.dtype)
    else:
        kernel = ring_kernel(shape, config, c, interpret, q.dtype)
    out, lse = kernel(q, k, v, blocks.counts, blocks.indices, jnp.stack([query_offset, lengths], axis=1))
    return out[:, :num_queries], lse[:, :, :num_queries].transpose(0, 2, 1)

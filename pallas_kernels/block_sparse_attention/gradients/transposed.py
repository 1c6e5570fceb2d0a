"""Transposed lists, as bits: which query tiles list each block of keys."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

from pallas_kernels.blocks import BlockIndices

WORD = 32  # bits that count, from the most significant one on
_ELEMENTS = 2**28  # of the masks that are packed at a time


def rows_within(blocks: BlockIndices, query_offset: Int[Array, "B"], lengths: Int[Array, "B"]) -> Bool[Array, "B Tb"]:
    """The rows that contain queries of the sequence; see api.py."""
    start = jnp.arange(blocks.counts.shape[2]) * blocks.block_size
    return query_offset[:, None] + start[None] < lengths[:, None]


@functools.partial(jax.jit, static_argnames=("num_key_blocks", "repeat"))
def listed_by(
    blocks: BlockIndices, rows: Bool[Array, "B Tb"], *, num_key_blocks: int, repeat: int = 1
) -> Int32[Array, "B Hs Sb words"]:
    """The rows that list each block, one bit for each: row r is bit 31 - r % 32 of word r // 32.

    Args:
      blocks: lists of key blocks.
      rows: rows whose lists count; the others are empty.
      num_key_blocks: Sb.
      repeat: bits per row, for kernels whose query tiles are parts of a block.
    """

    def pack(row_lists: BlockIndices) -> Int32[Array, "Sb words"]:
        mask = jnp.repeat(row_lists.to_mask(num_key_blocks), repeat, axis=0)
        mask = jnp.pad(mask, ((0, -len(mask) % WORD), (0, 0))).reshape(-1, WORD, num_key_blocks)
        place = (31 - jnp.arange(WORD, dtype=jnp.uint32))[None, :, None]
        words = jnp.where(mask, jnp.uint32(1) << place, 0).sum(1, dtype=jnp.uint32)
        return jax.lax.bitcast_convert_type(words.T, jnp.int32)

    batch, lists, num_rows = blocks.counts.shape
    counts = jnp.where(rows[:, None], blocks.counts, 0).reshape(-1, num_rows)
    flat = BlockIndices(counts, blocks.indices.reshape(*counts.shape, blocks.width), blocks.block_size)
    size = max(1, _ELEMENTS // (num_rows * num_key_blocks))
    words = jax.lax.map(pack, flat, batch_size=min(size, len(counts)))
    return words.reshape(batch, lists, num_key_blocks, -1)

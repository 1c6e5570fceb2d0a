"""`attention_with_block_scores` for Hopper GPUs, in Pallas Mosaic GPU. README.md beside this explains the kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.backends import Unsupported
from pallas_kernels.block_ground_truth.kernel import Call, ground_truth_kernel
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.flash_tiles import LOG2_E, QUERIES, positive_scale

TOKENS = 8  # TMA moves tokens in groups of 8
MAX_KEY_BLOCKS = 16384  # 1M tokens in blocks of 64, where workspace slots take 1 GiB


def attention_with_block_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    block_size: int,
    scale: float,
    block_scores: bool,
    token_scores: bool,
    statistic: str,
    segment_ids: Int[Array, "B S"],
    query_offset: Int[Array, ""],
) -> tuple:
    """See the function of this name in api.py; padding has segment id 0."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {q.dtype}.")
    if q.shape[3] not in (64, 128):
        raise Unsupported(f"takes head dims 64 and 128; got {q.shape[3]}.")
    if block_size not in (64, 128):
        raise Unsupported(f"takes blocks of 64 and 128 tokens; got {block_size}.")
    if -(-k.shape[1] // block_size) > MAX_KEY_BLOCKS:
        raise Unsupported(f"takes at most {MAX_KEY_BLOCKS} key blocks; got {-(-k.shape[1] // block_size)}.")
    asked = block_scores, token_scores
    return _attend(block_size, scale, asked, statistic, interpreter(), q, k, v, segment_ids, query_offset)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _attend(
    block_size: int,
    scale: float,
    asked: tuple[bool, bool],
    statistic: str,
    interpret: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    query_offset: Int[Array, ""],
) -> tuple:
    q, scale = positive_scale(q, scale)
    v = jnp.where((segment_ids > 0)[..., None, None], v, 0)  # padding may hold NaN, which a weight of 0 would keep
    rows, key_blocks = q.shape[1], -(-k.shape[1] // block_size)
    bounds = _bounds(segment_ids, query_offset, rows, block_size)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0))) for x in (q, k, v))
    batch, padded_rows, heads, head_dim = q.shape
    call = Call(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=head_dim,
        rows=rows,
        padded_rows=padded_rows,
        key_blocks=key_blocks,
        block_size=block_size,
        block_scores=asked[0],
        token_scores=asked[1],
        statistic=statistic,
        c=scale * LOG2_E,
        interpreted=interpret is not None,
    )
    scalars = jnp.stack([query_offset // QUERIES, jnp.int32(call.block_tiles)])
    # In a loop that is differentiated JAX takes out what is the same each time: the zeros, and then their reference, which it can't.
    *arrays, free = jax.lax.optimization_barrier((q, k, v, bounds, scalars, jnp.zeros(call.slots, jnp.int32)))
    out, lse, *scores = ground_truth_kernel(call, q.dtype, interpret)(*arrays, jax.new_ref(free))
    token = scores.pop()[:, :, :rows, :key_blocks] if asked[1] else None
    block = None
    if asked[0]:
        block = _per_block(scores.pop()[..., :key_blocks], rows, block_size, divide=call.divided_later)
    return out[:, :rows], lse[:, :rows], block, token


def _bounds(
    segment_ids: Int[Array, "B S"], query_offset: Int[Array, ""], rows: int, block_size: int
) -> Int32[Array, "B n 2"]:
    """For each 64 positions: the first key that the queries there see, and the position after the last query, no more than that of
    the first if no query exists.

    A block holds tokens of one sequence, then padding.
    """
    batch, keys = segment_ids.shape
    blocks = -(-keys // block_size) + 2  # the last CTA's queries may lie that far beyond the keys
    ids = jnp.pad(segment_ids, ((0, 0), (0, blocks * block_size - keys))).reshape(batch, blocks, block_size)
    number = jnp.arange(blocks)[None]
    begins = (ids[:, :, 0] != jnp.roll(ids[:, :, 0], 1, axis=1)) | (number == 0) | (ids[:, :, 0] == 0)
    first = block_size * jax.lax.cummax(jnp.where(begins, number, 0), axis=1)
    end = block_size * number + (ids > 0).sum(2)
    per_block = block_size // QUERIES
    first, end = (jnp.repeat(x, per_block, axis=1) for x in (first, end))
    position = QUERIES * jnp.arange(blocks * per_block)[None]
    end = jnp.minimum(end, query_offset + rows)
    return jnp.stack([first, jnp.maximum(end, position)], axis=2).astype(jnp.int32)


def _per_block(
    scores: Float32[Array, "B H n Sb"], rows: int, block_size: int, *, divide: bool
) -> Float32[Array, "B H Tb Sb"]:
    """The kernel's rows, one per 64 queries, combined to one per block, and divided by their sums where the kernel did not."""
    batch, heads, _, key_blocks = scores.shape
    scores = scores[:, :, : -(-rows // QUERIES)]
    per_block = block_size // QUERIES
    if per_block == 1 and not divide:
        return scores
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, -scores.shape[2] % per_block), (0, 0)))
    scores = scores.reshape(batch, heads, -1, per_block, key_blocks).max(3)
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)

"""Attention of one layer under a policy: of a prompt, and of one new token against the cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import BlockIndices, block_sparse_attention
from pallas_kernels.block_sparse_attention.skipping import tile_queries
from seer_jax.models.dense_attention import dense_attention
from seer_jax.selection.context import DecodeContext, PrefillContext
from seer_jax.selection.policies import Policy

# Block rows of queries whose scores and lists exist at once: at 64 tokens per block, a prompt of 32k tokens is one chunk. Fewer leave a
# large GPU idle between the kernels of one chunk and the next.
ROWS_AT_ONCE = 512
# Against a cache, whose size must not decide how much memory a chunk of the prompt takes, so many rows times blocks, and at least so
# many rows: those of 8192 tokens up to 512k tokens, where a layer with 32 heads takes 128 MiB for scores and as much for lists; fewer above.
SCORES_AT_ONCE, FEWEST_ROWS = 2**20, 16


class PromptAttention(NamedTuple):
    """Attention of the queries of a prompt or of a chunk of it.

    Fields:
      out: output.
      kept, visible: blocks that were kept, and blocks that could be, in each row of the batch, summed over block rows and lists.
    """

    out: Float[Array, "B T H D"]
    kept: Float32[Array, "B"]
    visible: Float32[Array, "B"]


def prefill_attention(policy: Policy, context: PrefillContext) -> tuple[Float[Array, "B T H D"], Float32[Array, "B"]]:
    """As `attend_prompt`, with the share of the causal blocks that was kept, and not skipped, in each row of the batch."""
    attended = attend_prompt(policy, context)
    return attended.out, share(attended.kept, attended.visible)


def attend_prompt(policy: Policy, context: PrefillContext) -> PromptAttention:
    """Attention of a prompt's queries to its keys.

    Scores and lists are made for some block rows at a time, so that they take memory O(H * rows * Sb), whatever T is.

    Args:
      policy: of this layer; which blocks are kept.
      context: of this layer.
    """
    if policy.is_dense and context.is_whole:
        out = dense_attention(context.q_rotated, context.k_rotated, context.v, lengths=context.lengths)
        every = jnp.ones(context.batch, jnp.float32)
        return PromptAttention(out, every, every)
    context = policy.prepare(context)
    at_once = ROWS_AT_ONCE
    if context.cached is not None:
        at_once = min(ROWS_AT_ONCE, max(FEWEST_ROWS, SCORES_AT_ONCE // context.num_key_blocks))
    if context.num_rows <= at_once:
        out, *counts = _attend_rows(policy, context)
    else:
        out, *counts = _attend_in_chunks(policy, context, at_once)
    # The sums are float32: at 512k tokens and 64 heads a prompt has 2^31 blocks, too many for int32.
    return PromptAttention(out, *(x.astype(jnp.float32).sum(-1) for x in counts))


def share(kept: Float32[Array, "*rows B"], visible: Float32[Array, "*rows B"]) -> Float32[Array, "*rows B"]:
    """Blocks kept over blocks visible; 0 where there were none."""
    return kept / jnp.maximum(visible, 1)


def kept_share(kept: Int[Array, "B Tb"], visible: Int[Array, "B Tb"]) -> Float32[Array, "B"]:
    """Blocks kept over blocks visible, each counted by block row and summed over lists. 0 for a sequence that ends before these rows."""
    return share(kept.astype(jnp.float32).sum(-1), visible.astype(jnp.float32).sum(-1))


class _Attended(NamedTuple):
    """Output of some block rows, and how many blocks each row kept and could keep, summed over its lists."""

    out: Float[Array, "B T H D"]
    kept: Int[Array, "B Tb"]
    visible: Int[Array, "B Tb"]


def _attend_rows(policy: Policy, context: PrefillContext) -> _Attended:
    lists, visible = policy.blocks(context), context.visible[:, 0, :, 0].astype(jnp.int32)
    blocks = _every_block(context) if lists is None else lists
    skips = policy.skip is not None
    keys, values, rows = context.cached or (context.k_rotated, context.v, None)
    with jax.named_scope("sparse_attention"):
        out = block_sparse_attention(
            context.q_rotated,
            keys,
            values,
            blocks,
            cache_rows=rows,
            query_offset=context.offset,
            lengths=context.lengths,
            density=policy.expected_density,
            skip_threshold=policy.skip,
            return_kept=skips,
        )
    if skips:
        out, kept = out
        heads = kept.shape[1]
        kept = by_block_row(kept.sum(1, dtype=jnp.int32), context.num_rows)
        tiles = context.valid_queries[:, :: tile_queries(context.block_size)]  # whether its first query exists
        tiles = by_block_row(tiles.astype(jnp.int32), context.num_rows)
        return _Attended(out, kept, heads * tiles * visible)
    assert isinstance(out, jax.Array)  # without return_lse
    if lists is None:
        return _Attended(out, visible, visible)
    return _Attended(out, lists.counts.sum(1, dtype=jnp.int32), lists.counts.shape[1] * visible)


def by_block_row(counts: Int[Array, "B tiles"], rows: int) -> Int[Array, "B Tb"]:
    """Sums over the tiles of queries of each block row, of which the last one may have fewer."""
    tiles = -(-counts.shape[1] // rows)
    return jnp.pad(counts, ((0, 0), (0, rows * tiles - counts.shape[1]))).reshape(-1, rows, tiles).sum(2)


def _every_block(context: PrefillContext) -> BlockIndices:
    """Lists that keep every visible block."""
    return BlockIndices.all_causal(
        context.q.shape[1],
        context.num_keys,
        block_size=context.block_size,
        query_offset=jnp.broadcast_to(jnp.asarray(context.offset), (context.batch,)),
        batch=context.batch,
    )


def _attend_in_chunks(policy: Policy, context: PrefillContext, at_once: int) -> _Attended:
    """As `_attend_rows`, at most `at_once` block rows at a time."""
    rows, tokens, b = context.num_rows, context.q.shape[1], context.block_size
    size = -(-rows // -(-rows // at_once))  # chunks as equal as whole rows allow
    whole = tokens // (size * b)

    def attend(first: int | Int[Array, ""], num_tokens: int, results: _Attended) -> _Attended:
        part = _attend_rows(policy, context.rows(first, num_tokens))
        places = first * b, first, first
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return _Attended(*map(write, results, part, places))

    counts = jnp.zeros((context.batch, rows), jnp.int32)
    results = _Attended(jnp.zeros_like(context.q_rotated), counts, counts)
    results = jax.lax.fori_loop(0, whole, lambda i, results: attend(i * size, size * b, results), results)
    done = whole * size
    return results if done == rows else attend(done, tokens - done * b, results)


def decode_attention(policy: Policy, context: DecodeContext) -> tuple[Float[Array, "B 1 H D"], Float32[Array, "B"]]:
    """Attention of one new token of each row to the cached ones, itself among them.

    Args:
      policy: of this layer; which blocks are kept.
      context: of this layer; the new token is already in its cache.

    Returns:
      (output, share of the visible blocks that was kept in each row of the batch).
    """
    blocks, kept = policy.blocks(context), jnp.ones(context.batch, jnp.float32)
    if blocks is not None:
        visible = (context.position // blocks.block_size + 1).astype(jnp.float32)
        kept = blocks.counts.astype(jnp.float32).mean(1) / visible
    with jax.named_scope("decode_attention"):
        out = context.cache.attend(context.q_rotated[:, 0], blocks)
    return out[:, None], kept

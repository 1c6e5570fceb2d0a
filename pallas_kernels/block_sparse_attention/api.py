"""`block_sparse_attention`: causal attention over a list of key blocks per query block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.checks import check_attention_inputs, check_integers, check_lists, check_range, resolve_scale

_run = Operation(
    "block_sparse_attention",
    "pallas_kernels.block_sparse_attention",
    gradients="block_sparse_attention_gradients",
    gradients_use_results=True,
)


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices,
    *,
    scale: float | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    lengths: Int[Array, "B"] | None = None,
    cache_rows: Int[Array, "B"] | None = None,
    density: float | None = None,
    skip_threshold: float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, "H"] | None = None,
    return_lse: bool = False,
    return_kept: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H D"] | tuple[Array, ...]:
    """Causal attention in which each block of queries sees only the key blocks on its list.

      out[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s],  s <= p,  s < lengths,  s // b on the list of t // b

    with p = query_offset + t the position of query t. Sums run in float32 for every dtype of q. Queries that see no key or lie
    beyond the sequence (p >= lengths) have output 0 and lse -inf.

    With `skip_threshold` = lambda, listed blocks of negligible weight are skipped (BLASST). Tiles of min(b, 64) queries of one head
    visit their list in ascending order. A tile skips block j if for each of its queries that sees a key of j

      exp(max_{s in j} score[t, s] - max_{s in the listed blocks before j} score[t, s]) < lambda

    and computes neither exponentials nor a product with the values for it. The weights of a skipped block sum to less than lambda b
    times the sum of those that were not skipped: with n skipped blocks lse falls by at most log(1 + n lambda b), and an element of
    the output moves by at most 2 n lambda b max|v|. A query's first block is never skipped, nor is the one that holds its largest
    score.

    Reverse-mode differentiable in q, k and v, by output and lse, without `skip_threshold`. The backward recomputes the weights from
    lse, in memory that grows with T b and with one bit (XLA: one byte) per head and pair of blocks. No sum is made in an order that
    changes: two runs give the same gradients bit by bit.

    Args:
      q: queries; H is a multiple of K, and query head h reads key/value head h // (H / K).
      k, v: keys and values at positions 0 to S - 1, of q's dtype: float32, bfloat16 or float16; finite in the listed blocks.
        Beyond `lengths` they may hold anything, NaN and infinity too. P is B unless `cache_rows` is given.
      blocks: lists of key blocks, counts [B, Hs, Tb] and indices [B, Hs, Tb, N] with Hs in {1, K, H}. Rows are blocks of b
        queries counted from the first query, for every `query_offset`.
      scale: factor on the scores; 1 / sqrt(D) if None.
      query_offset: position of the first query, in tokens from the first key; one for the batch or one per sequence.
      lengths: number of keys of each sequence, right-padded up to S; S if None or more.
      cache_rows: row of k and v that each sequence reads, 0 to P - 1; None: its own index. If the caches of all layers are one
        array of L * B rows, a layer reads its rows layer * B + arange(B) without a copy. Without gradients.
      density: expected share of the visible blocks that are listed, 0 to 1; None if unknown. Decides only which kernel is used,
        not the results.
      skip_threshold: lambda, in [0, 1]; one for all heads or one per query head. 0 skips nothing, None neither. Its value may
        change without compilation. Without gradients.
      return_lse: whether to return the natural logarithm of the sum of exp(scores) of each query as well.
      return_kept: whether to return how many blocks of its list each tile of min(b, 64) queries computed; with `skip_threshold`
        alone. Blocks of which the tile sees no key do not count.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; bfloat16 and float16, D 64 and 128, b 64 and 128), or None
        for the fastest that takes these arguments on their device.

    Returns:
      out [B, T, H, D] of q's dtype, or a tuple of it and what else was asked for: lse [B, T, H] float32, then
      kept [B, H, ceil(T / min(b, 64))] int32.

    Raises:
      ValueError: shapes or dtypes that do not match, a threshold or cache row out of its domain, or an unknown implementation.
      NotImplementedError: the named implementation cannot do this, or gradients with `skip_threshold` or `cache_rows`.

    Source: SeerAttention, arXiv 2410.13276 (its block-sparse FlashAttention kernel); `skip_threshold`: BLASST, arXiv 2512.12087.

    >>> q, k = jnp.ones((1, 128, 4, 64)), jnp.ones((1, 128, 2, 64))
    >>> blocks = BlockIndices.from_mask(jnp.eye(2, dtype=bool)[None, None], block_size=64)
    >>> out, lse = block_sparse_attention(q, k, k, blocks, return_lse=True)
    >>> out.shape, jnp.exp(lse[0, 127, 0] - 64 / 64**0.5).round(3).item()
    ((1, 128, 4, 64), 64.0)
    """
    name = "block_sparse_attention"
    check_attention_inputs(name, q, k, v, query_axes="B T H D", same_batch=cache_rows is None)
    check_lists(name, blocks)
    batch, num_queries, heads, head_dim = q.shape
    kv_heads, num_rows = k.shape[2], -(-num_queries // blocks.block_size)
    lists = tuple((batch, h, num_rows) for h in sorted({1, kv_heads, heads}))
    if blocks.counts.shape not in lists:
        raise ValueError(
            f"{name}: blocks.counts must be [B, Hs, Tb], one of {lists} here (Hs in {{1, K, H}}, Tb = ceil(T / b)); "
            f"got {blocks.counts.shape}."
        )
    query_offset = jnp.asarray(query_offset)
    if query_offset.ndim:
        check_integers(name, "query_offset", query_offset, "[B]", (batch,))
    else:
        check_integers(name, "query_offset", query_offset, "[]", ())
    padded = lengths is not None
    if lengths is None:
        lengths = jnp.full((batch,), k.shape[1], jnp.int32)
    check_integers(name, "lengths", lengths, "[B]", (batch,))
    if cache_rows is not None:
        check_integers(name, "cache_rows", cache_rows, "[B]", (batch,))
        check_range(name, "cache_rows", cache_rows, len(k) - 1, "the rows of k and v")
        cache_rows = cache_rows.astype(jnp.int32)
        q, k, v = _without_gradients("cache_rows", q, k, v)
    if skip_threshold is not None:
        skip_threshold = _checked_threshold(name, skip_threshold, heads)
        q, k, v = _without_gradients("skip_threshold", q, k, v)
    elif return_kept:
        raise ValueError(
            f"{name}: return_kept counts the blocks that skip_threshold leaves; got None. Use skip_threshold=0.0 to skip nothing."
        )
    out, lse, kept = _run(
        implementation,
        q,
        k,
        v,
        blocks,
        scale=resolve_scale(name, scale, head_dim),
        query_offset=jnp.broadcast_to(query_offset, (batch,)).astype(jnp.int32),
        lengths=jnp.minimum(lengths, k.shape[1]).astype(jnp.int32),
        density=density,
        padded=padded,
        skip_threshold=skip_threshold,
        cache_rows=cache_rows,
    )
    others = *((lse,) if return_lse else ()), *((kept,) if return_kept else ())
    return (out, *others) if others else out


def _checked_threshold(name: str, value: Any, heads: int) -> Float32[Array, "H"]:
    """The threshold of each head."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: skip_threshold must hold numbers; got {array.dtype}.")
    if array.shape not in ((), (heads,)):
        raise ValueError(f"{name}: skip_threshold must have shape [] or [H] = ({heads},); got {array.shape}.")
    if not isinstance(array, Tracer) and not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name}: skip_threshold must lie in [0, 1]; got {value}.")
    return jnp.broadcast_to(array, (heads,)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_gradients(setting: str, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, k, v


def _refuse_gradients(setting: str, *_: Array) -> Any:
    raise NotImplementedError(
        f"block_sparse_attention: {setting} has no gradients. Use {setting}=None where gradients are taken."
    )


_without_gradients.defvjp(_refuse_gradients, _refuse_gradients)

"""`attention_with_block_scores`: dense causal attention that also returns a gate's training targets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import (
    check_attention_inputs,
    check_block_size,
    check_integers,
    check_range,
    integer_scalar,
    resolve_scale,
)

STATISTICS = ("max", "mass")

_run = Operation("attention_with_block_scores", "pallas_kernels.block_ground_truth")


class AttentionWithScores(NamedTuple):
    """Attention and the requested block scores, whose rows sum to 1, or to 0 if there is nothing to score.

    Fields:
      output: [B, T, H, D], in q's dtype.
      lse: [B, T, H], natural logarithm of the sum of exp(scores); -inf at padding.
      block_scores: [B, H, Tb, Sb], targets of a prefill gate, or None.
      token_scores: [B, K, T, Sb], targets of a decode gate, or None.
    """

    output: Float[Array, "B T H D"]
    lse: Float32[Array, "B T H"]
    block_scores: Float32[Array, "B H Tb Sb"] | None
    token_scores: Float32[Array, "B K T Sb"] | None


def attention_with_block_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    block_size: int = 64,
    scale: float | None = None,
    block_scores: bool = True,
    token_scores: bool = False,
    statistic: str = "max",
    query_offset: int | Int[Array, ""] = 0,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> AttentionWithScores:
    """Dense causal attention that also returns the largest attention weight, or the attention mass, of each block.

    With A[h, t, s] = softmax_s(scale * q[t] . k[s]) over s <= t of the same sequence, t and s being positions among the keys, a
    block j weighs for a query

      M[h, t, j] = max of A[h, t, s] over s in block j    (statistic "max")
      M[h, t, j] = sum of A[h, t, s] over s in block j    (statistic "mass")

    and the scores are

      block_scores[h, i, j] = max of M[h, t, j] over t in block i, each row i divided by its sum over j;
      token_scores[c, t, j] = max ("max") or mean ("mass") of M[h, t, j] over the query heads h of key/value head c, for the blocks
        j < t // b of the same sequence (completed and earlier), each row t divided by its sum over j.

    They are exact: float32 softmax with the final row maximum and sum.

    A long sequence can be processed in chunks of queries that attend to all keys, so that token_scores [B, K, T, Sb] never exist as a
    whole: q is a chunk, and `query_offset` the position of its first query.

    Args:
      q: queries; H is a multiple of K, and query head h reads key/value head h // (H / K).
      k, v: keys and values, of q's dtype: float32, bfloat16 or float16.
      block_size: b, tokens per block: 16, 32, 64 or 128.
      scale: factor on the scores; 1 / sqrt(D) if None.
      block_scores: whether to return `block_scores`.
      token_scores: whether to return `token_scores`.
      statistic: "max", the target of the authors' gates, or "mass", the share of the attention that a block catches.
      query_offset: position of the first query among the keys, a multiple of b, at most S - T. May be traced.
      lengths: number of keys of each sequence, right-padded up to S; S if None.
      segment_ids: number of each token's sequence, from 1 on, for sequences packed in a row that start at multiples of b; 0 is
        padding. Tokens attend within their sequence alone. Excludes `lengths`.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; float16 or bfloat16, D 64 or 128, blocks of 64 or 128), or None
        for the fastest that takes these arguments on their device.

    Returns:
      AttentionWithScores. Queries that are padding have output 0, lse -inf and scores 0. Not differentiable: scores are targets, and
      training of all weights takes its output from another pass.

    Raises:
      ValueError: shapes or dtypes that do not match, an unknown statistic or implementation, or, where their values are known,
        offset, lengths or segments that are none.
      NotImplementedError: the named implementation cannot do this, or a gradient is taken.

    Source: the ground truth of self-distillation in SeerAttention, arXiv 2410.13276, and SeerAttention-R, arXiv 2506.08889.

    >>> q, k = jnp.ones((1, 128, 4, 64)), jnp.ones((1, 128, 2, 64))
    >>> attention_with_block_scores(q, k, k).block_scores[0, 0].round(4).tolist()
    [[1.0, 0.0], [0.5, 0.5]]

    The first query of block 1 sees 64 keys of block 0, of equal weight, and itself; the last one has half of its mass in each.

    >>> scores = attention_with_block_scores(q, k, k, statistic="mass").block_scores
    >>> (100 * scores[0, 0]).round().tolist()
    [[100.0, 0.0], [66.0, 34.0]]
    """
    name = "attention_with_block_scores"
    check_attention_inputs(name, q, k, v, query_axes="B T H D")
    check_block_size(name, block_size)
    if statistic not in STATISTICS:
        raise ValueError(f"{name}: statistic must be one of {STATISTICS}; got {statistic!r}.")
    (batch, num_queries, _, head_dim), num_keys = q.shape, k.shape[1]
    query_offset = _check_offset(name, query_offset, num_queries, num_keys, block_size)
    if lengths is not None and segment_ids is not None:
        raise ValueError(
            f"{name}: lengths and segment_ids must not both be given; got both. Mark padding by segment id 0."
        )
    if segment_ids is None:
        lengths = jnp.full((batch,), num_keys) if lengths is None else lengths
        check_integers(name, "lengths", lengths, "[B]", (batch,))
        check_range(name, "lengths", lengths, num_keys, "the keys of a sequence")
        segment_ids = jnp.arange(num_keys)[None] < lengths[:, None]
    else:
        check_integers(name, "segment_ids", segment_ids, "[B, S]", (batch, num_keys))
        _check_starts(name, segment_ids, block_size)
    output = _run(
        implementation,
        *_without_gradient((q, k, v)),
        block_size=block_size,
        scale=resolve_scale(name, scale, head_dim),
        block_scores=block_scores,
        token_scores=token_scores,
        statistic=str(statistic),
        segment_ids=segment_ids.astype(jnp.int32),
        query_offset=query_offset,
    )
    return AttentionWithScores(*output)


def _check_offset(name: str, offset: int | Array, num_queries: int, num_keys: int, block_size: int) -> Int32[Array, ""]:
    """The offset as an array. Raises ValueError if it is known and invalid."""
    last = num_keys - num_queries
    if last < 0:
        raise ValueError(
            f"{name}: S must be at least T, since every query is one of the keys; got T={num_queries} and S={num_keys}."
        )
    array, known = integer_scalar(name, "query_offset", offset)
    if known is not None and (not 0 <= known <= last or known % block_size):
        raise ValueError(
            f"{name}: query_offset must be a multiple of block_size={block_size} from 0 to S - T = {last}; got {known}."
        )
    return array


def _check_starts(name: str, segment_ids: Array, block_size: int) -> None:
    """Raises ValueError where ids are known and a sequence begins within a block, which the scores would give to the one before it."""
    if isinstance(segment_ids, Tracer):
        return
    ids = np.asarray(segment_ids)
    rows, places = np.nonzero((ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] != 0))
    if (wrong := np.flatnonzero((places + 1) % block_size)).size:
        raise ValueError(
            f"{name}: sequences of segment_ids must start at multiples of block_size={block_size}; got one that starts at "
            f"{places[wrong[0]] + 1} in row {rows[wrong[0]]}. Pad the sequence before it by id 0."
        )


@jax.custom_jvp
def _without_gradient(arrays):
    return arrays


@_without_gradient.defjvp
def _refuse_gradient(primals, tangents):
    raise NotImplementedError(
        "attention_with_block_scores: q, k and v must not be differentiated, since the results are training targets; "
        "got a gradient. Pass them through jax.lax.stop_gradient."
    )

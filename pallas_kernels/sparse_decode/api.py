"""`sparse_decode_attention`: attention of one new token per sequence over a list of key blocks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.checks import (
    check_attention_inputs,
    check_integers,
    check_lists,
    check_range,
    check_shape,
    resolve_scale,
)

_run = Operation(
    "sparse_decode_attention", "pallas_kernels.sparse_decode", gradients="sparse_decode_attention_gradients"
)


def sparse_decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    *,
    lengths: Int[Array, "B"],
    cache_rows: Int[Array, "B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """Attention of the newest token over the key blocks on its list, one list per key/value head.

      out[h] = sum_s softmax_s(scale * q[h] . k[s]) v[s],  s < lengths,  s // b on the list of key/value head h // (H / K)

    Sums run in float32 for every dtype of q. A head that sees no key has output 0 and lse -inf. Differentiable in q, k and v.

    Args:
      q: the query of the newest token; H is a multiple of K.
      k, v: the cache, keys and values at positions 0 to S - 1, of q's dtype: float32, bfloat16 or float16; finite in the listed
        blocks. Beyond `lengths` they may hold anything, NaN and infinity too. P is B unless `cache_rows` is given.
      blocks: lists of key blocks, counts [B, K] and indices [B, K, N]; None: every key, dense attention.
      lengths: number of keys of each sequence, the newest token included, 0 to S; 0 for an unused row. Under `jax.jit`, where they
        are not known, larger ones are S and negative ones 0.
      cache_rows: row of k and v that each sequence reads, 0 to P - 1; None: its own index. If the caches of all layers are one
        array of L * B rows, a layer reads its rows layer * B + arange(B) without a copy.
      scale: factor on the scores; 1 / sqrt(D) if None.
      return_lse: whether to return the natural logarithm of the sum of exp(scores) as well.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; bfloat16 and float16, D 64 and 128, S a multiple of 8), or
        None for the fastest that takes these arguments on their device.

    Returns:
      out [B, H, D] of q's dtype, or (out, lse [B, H] float32).

    Raises:
      ValueError: shapes or dtypes that do not match, lengths or cache rows out of their domain, or an unknown implementation.
      NotImplementedError: the named implementation cannot do this.

    Source: SeerAttention-R, arXiv 2506.08889 (its block-sparse decoding kernel).

    >>> q, cache = jnp.ones((1, 4, 64)), jnp.ones((1, 256, 2, 64))
    >>> blocks = BlockIndices(jnp.array([[2, 1]]), jnp.array([[[0, 2], [2, 0]]]), 64)
    >>> out, lse = sparse_decode_attention(q, cache, cache, blocks, lengths=jnp.array([130]), return_lse=True)
    >>> jnp.exp(lse - 64 / 64**0.5).round(2).tolist()
    [[66.0, 66.0, 2.0, 2.0]]
    """
    name = "sparse_decode_attention"
    check_attention_inputs(name, q, k, v, query_axes="B H D", same_batch=cache_rows is None)
    batch, _, head_dim = q.shape
    if cache_rows is None:
        cache_rows = jnp.arange(batch)
    else:
        check_integers(name, "cache_rows", cache_rows, "[B]", (batch,))
        check_range(name, "cache_rows", cache_rows, len(k) - 1, "the rows of k and v")
    if blocks is not None:
        check_lists(name, blocks)
        check_shape(name, "blocks.counts", blocks.counts, "[B, K]", (batch, k.shape[2]))
    check_integers(name, "lengths", lengths, "[B]", (batch,))
    check_range(name, "lengths", lengths, k.shape[1], "the keys of the cache")
    out, lse = _run(
        implementation,
        q,
        k,
        v,
        blocks,
        lengths=jnp.clip(lengths, 0, k.shape[1]).astype(jnp.int32),
        cache_rows=cache_rows.astype(jnp.int32),
        scale=resolve_scale(name, scale, head_dim),
    )
    return (out, lse) if return_lse else out

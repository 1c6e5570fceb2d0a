"""`score_blocks`: scores of key blocks for queries, before softmax."""

from jaxtyping import Array, Float32, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import check_arrays, integer_scalar, resolve_scale

_run = Operation("score_blocks", "pallas_kernels.gate_scores", gradients="score_blocks_gradients")

# Scores of a head below which XLA's product takes less time than the kernel's preparations.
MIN_KERNEL_SCORES = 1024 * 1024


def score_blocks(
    queries: Float32[Array, "B T H C"],
    keys: Float32[Array, "B Sb K C"],
    *,
    scale: float | None = None,
    causal: bool = False,
    row_offset: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> Float32[Array, "B H T Sb"]:
    """Scores of key blocks: products of a gate's queries and keys with the accuracy of float32, since thresholds apply to them.

      score[h, t, j] = scale * queries[t, h] . keys[j, h // (H / K)]

    Differentiable.

    Args:
      queries: one per token or block of tokens; H is a multiple of K.
      keys: one per key block.
      scale: factor on the products; 1 / sqrt(C) if None.
      causal: whether entries with j > row_offset + t are not needed. They may hold anything then, including NaN; if T = Sb, half
        the work remains.
      row_offset: position of the first query among the key blocks, at least 0, for queries that are a chunk of rows. May be
        traced. Used only if `causal`.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; C 64 or 128; T 64 or more), or None for the fastest that
        takes these arguments on their device, "xla" for few scores.

    Returns:
      float32; errors are below 1e-6 of the product of the vectors' norms.

    Raises:
      ValueError: shapes or dtypes that do not match.
      NotImplementedError: the named implementation cannot do this.

    >>> score_blocks(jnp.ones((1, 2, 4, 64)), jnp.ones((1, 3, 2, 64)))[0, 0].tolist()
    [[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]]
    """
    name = "score_blocks"
    check_arrays(name, queries=queries, keys=keys)
    if {str(queries.dtype), str(keys.dtype)} != {"float32"} or queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(
            f"{name}: queries must be float32 [B, T, H, C] and keys float32 [B, Sb, K, C]; "
            f"got {queries.dtype} {queries.shape} and {keys.dtype} {keys.shape}."
        )
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3] or queries.shape[2] % keys.shape[2]:
        raise ValueError(
            f"{name}: queries and keys must agree in B and C, and H must be a multiple of K; got {queries.shape} and {keys.shape}."
        )
    if 0 in queries.shape or 0 in keys.shape:
        raise ValueError(f"{name}: no axis may be empty; got {queries.shape} and {keys.shape}.")
    row_offset, known = integer_scalar(name, "row_offset", row_offset)
    if known is not None and known < 0:
        raise ValueError(f"{name}: row_offset must be at least 0; got {known}.")
    if implementation is None and queries.shape[1] * keys.shape[1] < MIN_KERNEL_SCORES:
        implementation = "xla"
    scale = resolve_scale(name, scale, queries.shape[3])
    return _run(implementation, queries, keys, scale=scale, causal=causal, row_offset=row_offset)

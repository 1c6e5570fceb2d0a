"""`score_sub_blocks`: scores of key blocks from several query and key vectors per block."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import check_arrays, check_integers, resolve_scale

_run = Operation("score_sub_blocks", "pallas_kernels.sub_block_scores", gradients="score_sub_blocks_gradients")

JOINS = ("sum", "max")
HEADS = ("each", "max", "mean")


def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "B Sw K C"],
    *,
    seen: Int[Array, "#B Tu 2"],
    queries_per_row: int,
    keys_per_block: int,
    join: str = "sum",
    heads: str = "each",
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float32[Array, "B lists rows Sb"]:
    """Scores of key blocks from attention between pooled vectors, several per block: logarithms of shares of a softmax.

    With u a query vector, w a key vector, i a row (`queries_per_row` consecutive query vectors) and j a block (`keys_per_block`
    consecutive key vectors),

      p[h, u, w] = softmax over the w that u sees of scale * queries[u, h] . keys[w, h // (H / K)];
      share[h, u, j] = sum, or maximum, of p[h, u, w] over w in block j;
      share[c, u, j] = mean, or maximum, of share[h, u, j] over the query heads h of key head c, unless `heads` is "each";
      score[l, i, j] = log(max of share[l, u, j] over u in row i).

    With one vector per row and block, `score` is the logarithm of the softmax over `score_blocks`. Differentiable in queries and keys;
    the gradient of a maximum goes to the largest element.

    Args:
      queries: one per pool of query tokens, or per token; H is a multiple of K.
      keys: one per pool of key tokens; float32 or bfloat16.
      seen: the first key vector that each query vector sees, and the one after the last. A query vector sees none where these are
        not ascending. Vectors that are not seen may hold anything.
      queries_per_row: at least 1. The last row may have fewer.
      keys_per_block: at least 1. The last block may have fewer.
      join: how the key vectors of a block join: "sum" or "max".
      heads: how the query heads of a key head join: "each" (they do not), "max" or "mean".
      scale: factor on the products; 1 / sqrt(C) if None.
      implementation: "reference", "xla", or None for the fastest that takes these arguments on their device.

    Returns:
      Scores of each list: H lists if `heads` is "each", otherwise K; rows = ceil(Tu / queries_per_row), Sb = ceil(Sw /
      keys_per_block). At most 0; -inf where no query vector of the row sees a key vector of the block.

    Raises:
      ValueError: shapes or dtypes that do not match, or settings out of their domain.
      NotImplementedError: the named implementation cannot do this.

    >>> queries, keys = jnp.ones((1, 2, 1, 64)), jnp.ones((1, 4, 1, 64))
    >>> scores = score_sub_blocks(queries, keys, seen=jnp.array([[[0, 1], [0, 4]]]), queries_per_row=1, keys_per_block=2)
    >>> jnp.exp(scores)[0, 0].round(4).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    name = "score_sub_blocks"
    _check_vectors(name, queries, keys)
    tokens = queries.shape[1]
    check_arrays(name, seen=seen)
    batch = queries.shape[0] if seen.ndim != 3 or seen.shape[0] != 1 else 1
    check_integers(name, "seen", seen, "[B or 1, Tu, 2]", (batch, tokens, 2))
    for setting, value in (("queries_per_row", queries_per_row), ("keys_per_block", keys_per_block)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {setting} must be an integer of at least 1; got {value!r}.")
    for setting, value, choices in (("join", join, JOINS), ("heads", heads, HEADS)):
        if value not in choices:
            raise ValueError(f"{name}: {setting} must be one of {choices}; got {value!r}.")
    return _run(
        implementation,
        queries,
        keys,
        seen=seen.astype(jnp.int32),
        queries_per_row=queries_per_row,
        keys_per_block=keys_per_block,
        join=join,
        heads=heads,
        scale=resolve_scale(name, scale, queries.shape[3]),
    )


def _check_vectors(name: str, queries: Any, keys: Any) -> None:
    """Raises ValueError unless queries and keys can be multiplied."""
    check_arrays(name, queries=queries, keys=keys)
    if (
        queries.dtype != jnp.float32
        or keys.dtype not in (jnp.float32, jnp.bfloat16)
        or {queries.ndim, keys.ndim} != {4}
    ):
        raise ValueError(
            f"{name}: queries must be float32 [B, Tu, H, C] and keys float32 or bfloat16 [B, Sw, K, C]; "
            f"got {queries.dtype} {queries.shape} and {keys.dtype} {keys.shape}."
        )
    if 0 in queries.shape or 0 in keys.shape:
        raise ValueError(f"{name}: no axis may be empty; got {queries.shape} and {keys.shape}.")
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3] or queries.shape[2] % keys.shape[2]:
        raise ValueError(
            f"{name}: queries and keys must agree in B and C, and H must be a multiple of K; got {queries.shape} and {keys.shape}."
        )

"""`score_sub_blocks`: scores of key blocks from several query and key vectors per block."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import check_array, check_arrays, check_count, check_integers, integer_scalar, resolve_scale

_run = Operation("score_sub_blocks", "pallas_kernels.sub_block_scores", gradients="score_sub_blocks_gradients")

# Products below which XLA takes less time than the kernel's preparations.
MIN_KERNEL_PRODUCTS = 2**18

JOINS = ("sum", "max")
HEADS = ("each", "max", "mean")


def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "P Sw K C"],
    *,
    seen: Int[Array, "#B Tu 2"],
    queries_per_row: int,
    keys_per_block: int,
    join: str = "sum",
    heads: str = "each",
    scale: float | None = None,
    first_row: int | Int[Array, ""] | None = None,
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
      keys: one per pool of key tokens; float32 or bfloat16. For one query vector they are read in place if they are the transposed view
        (`keys.swapaxes(1, 2)`) of an array [P, K, Sw, C], as caches keep them.
      seen: the first key vector that each query vector sees, and the one after the last. A query vector sees none where these are
        not ascending. Vectors that are not seen may hold anything.
      queries_per_row: at least 1. The last row may have fewer.
      keys_per_block: at least 1. The last block may have fewer.
      join: how the key vectors of a block join: "sum" or "max".
      heads: how the query heads of a key head join: "each" (they do not), "max" or "mean".
      scale: factor on the products; 1 / sqrt(C) if None.
      first_row: where the B rows of keys begin among P rows, such as those of all layers of a cache, so that a layer's are read in
        place. None: keys has B rows.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; C 64 or 128; 1, 2, 4, 8 or 16 keys per block; for one query vector
        bfloat16 keys of a multiple of 8 blocks, otherwise as many query vectors per row as fit), or None for the fastest that takes
        these arguments on their device, "xla" for few products.

    Returns:
      Scores of each list: H lists if `heads` is "each", otherwise K; rows = ceil(Tu / queries_per_row), Sb = ceil(Sw /
      keys_per_block). At most 0; -inf where no query vector of the row sees a key vector of the block. "mosaic_gpu" multiplies float16
      values: errors are at most 2^-9 of the largest |scale| |query| |key|, and about a thirtieth of that for random vectors: 0.02
      where products have a standard deviation of 60. With one query vector its errors are those of float32. It returns at least
      -87.4 where a block is seen.

    Raises:
      ValueError: shapes or dtypes that do not match, or settings out of their domain.
      NotImplementedError: the named implementation cannot do this.

    >>> queries, keys = jnp.ones((1, 2, 1, 64)), jnp.ones((1, 4, 1, 64))
    >>> scores = score_sub_blocks(queries, keys, seen=jnp.array([[[0, 1], [0, 4]]]), queries_per_row=1, keys_per_block=2)
    >>> jnp.exp(scores)[0, 0].round(4).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    name = "score_sub_blocks"
    _check_vectors(name, queries, keys, any_rows=first_row is not None)
    tokens = queries.shape[1]
    check_array(name, "seen", seen)
    batch = queries.shape[0] if seen.ndim != 3 or seen.shape[0] != 1 else 1
    check_integers(name, "seen", seen, "[B or 1, Tu, 2]", (batch, tokens, 2))
    check_count(name, "queries_per_row", queries_per_row)
    check_count(name, "keys_per_block", keys_per_block)
    for setting, value, choices in (("join", join, JOINS), ("heads", heads, HEADS)):
        if value not in choices:
            raise ValueError(f"{name}: {setting} must be one of {choices}; got {value!r}.")
    if implementation is None and queries.shape[0] * tokens * queries.shape[2] * keys.shape[1] < MIN_KERNEL_PRODUCTS:
        implementation = "xla"
    return _run(
        implementation,
        queries,
        keys,
        seen=seen.astype(jnp.int32),
        queries_per_row=int(queries_per_row),
        keys_per_block=int(keys_per_block),
        join=join,
        heads=heads,
        scale=resolve_scale(name, scale, queries.shape[3]),
        first_row=_checked_row(name, first_row, keys.shape[0] - queries.shape[0]),
    )


def _checked_row(name: str, row: int | Array | None, last: int) -> Int32[Array, ""] | None:
    """The first row as an array. Raises ValueError if it is known and invalid."""
    if row is None:
        return None
    array, known = integer_scalar(name, "first_row", row)
    if known is not None and not 0 <= known <= last:
        raise ValueError(f"{name}: first_row must lie from 0 to P - B = {last}; got {known}.")
    return array


def _check_vectors(name: str, queries: Any, keys: Any, *, any_rows: bool) -> None:
    """Raises ValueError unless queries and keys can be multiplied."""
    check_arrays(name, queries=queries, keys=keys)
    if (
        queries.dtype != jnp.float32
        or keys.dtype not in (jnp.float32, jnp.bfloat16)
        or {queries.ndim, keys.ndim} != {4}
    ):
        raise ValueError(
            f"{name}: queries must be float32 [B, Tu, H, C] and keys float32 or bfloat16 [P, Sw, K, C]; "
            f"got {queries.dtype} {queries.shape} and {keys.dtype} {keys.shape}."
        )
    if 0 in queries.shape or 0 in keys.shape:
        raise ValueError(f"{name}: no axis may be empty; got {queries.shape} and {keys.shape}.")
    if (queries.shape[0] != keys.shape[0] and not any_rows) or queries.shape[0] > keys.shape[0]:
        raise ValueError(
            f"{name}: queries and keys must agree in B, unless first_row says where the rows of more keys begin; "
            f"got {queries.shape} and {keys.shape}."
        )
    if queries.shape[3] != keys.shape[3] or queries.shape[2] % keys.shape[2]:
        raise ValueError(
            f"{name}: queries and keys must agree in C, and H must be a multiple of K; got {queries.shape} and {keys.shape}."
        )

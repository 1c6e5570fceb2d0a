"""Is a result of `attention_with_block_scores` right? Answered on a few blocks of queries, so that it is cheap at any length."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from pallas_kernels.block_ground_truth.api import AttentionWithScores
from pallas_kernels.online_softmax import dot
from pallas_kernels.precision import rounded

BLOCK = 64
BLOCKS_CHECKED = 4  # of queries, each in every head of a group
FLOAT32 = float(np.finfo(np.float32).eps)
LSE_BOUND = 1e-4
SCORES_BOUND = 1e-4  # of the row's largest


class Errors(NamedTuple):
    """How far a result is from the definition in float32, on sampled rows.

    Fields:
      out: of the output, relative (root of the sum of squares).
      plain: of attention without any trick in the dtype of the inputs, on the same rows.
      lse: largest difference.
      scores: largest difference of the scores that were asked for, over the largest score of the row.
    """

    out: float
    plain: float
    lse: float
    scores: float


def find_fault(errors: Errors, first: AttentionWithScores, second: AttentionWithScores) -> str | None:
    """What is wrong with the results of two runs of the same call."""
    arrays = jax.tree.leaves(first)
    if not all(bool(jnp.isfinite(x).all()) for x in arrays):
        return "a result holds a number that is not finite"
    if not errors.out <= 2 * errors.plain + 4 * FLOAT32:
        return f"the output errs by {errors.out:.2e}; twice plain attention's {errors.plain:.2e} are allowed"
    if not errors.lse <= LSE_BOUND:
        return f"lse errs by {errors.lse:.2e}; {LSE_BOUND:.0e} is allowed"
    if not errors.scores <= SCORES_BOUND:
        return f"scores err by {errors.scores:.2e} of a row's largest; {SCORES_BOUND:.0e} is allowed"
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(arrays, jax.tree.leaves(second), strict=True)):
        return "two runs on the same arrays differ"
    return None


def sampled_errors(
    key: PRNGKeyArray,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    query_offset: Int[Array, ""],
    result: AttentionWithScores,
) -> Errors:
    """Errors on a few blocks of 64 queries at random, of sequences without padding; blocks are of 64 tokens."""
    return Errors(*map(float, _sampled_errors(key, q, k, v, query_offset, result)))


@jax.jit
def _sampled_errors(key, q, k, v, query_offset, result) -> tuple[Float32[Array, ""], ...]:
    (batch, tokens, _, _), kv_heads = q.shape, k.shape[2]
    keys = jax.random.split(key, 3)
    sequence = jax.random.randint(keys[0], (BLOCKS_CHECKED,), 0, batch)
    kv_head = jax.random.randint(keys[1], (BLOCKS_CHECKED,), 0, kv_heads)
    row = jax.random.randint(keys[2], (BLOCKS_CHECKED,), 0, -(-tokens // BLOCK)).at[0].set((tokens - 1) // BLOCK)

    def one(place: tuple[Array, Array, Array]) -> Any:
        return _block(q, k, v, query_offset, result, *place)

    squares, lse_error, scores_error = jax.lax.map(one, (sequence, kv_head, row))
    wrong, plain_wrong, size = jnp.sqrt(squares.sum(0))
    return wrong / size, plain_wrong / size, lse_error.max(), scores_error.max()


def _block(q, k, v, query_offset, result, sequence, kv_head, row) -> tuple[Array, Array, Array]:
    """Squares of (error, plain attention's error, output), and the largest errors of lse and scores, for a group of heads."""
    group = q.shape[2] // k.shape[2]
    token = row * BLOCK + jnp.arange(BLOCK)
    there = token < q.shape[1]

    def mine(x: Array) -> Array:  # [T, H, ...] of the sequence, as [64, G, ...]
        return jax.lax.dynamic_slice_in_dim(x[sequence], kv_head * group, group, axis=1).at[token].get(mode="clip")

    queries, (keys, values) = mine(q), (x[sequence, :, kv_head] for x in (k, v))
    position, key = query_offset + token, jnp.arange(k.shape[1])
    mask = (key[None] <= position[:, None])[:, None]  # [64, 1, S]

    def weights(queries: Array, keys: Array) -> tuple[Array, Array]:
        scores = dot("tgd,sd->tgs", queries, keys) * q.shape[-1] ** -0.5
        scores = jnp.where(mask, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        return jnp.exp(scores - lse[..., None]), lse

    plain_weights, _ = weights(queries, keys)
    plain = rounded(dot("tgs,sd->tgd", plain_weights.astype(v.dtype), values), v.dtype)
    exact, lse = weights(queries.astype(jnp.float32), keys.astype(jnp.float32))
    out = dot("tgs,sd->tgd", exact, values.astype(jnp.float32))
    got = mine(result.output).astype(jnp.float32)
    squares = [jnp.where(there[:, None, None], x, 0) ** 2 for x in (got - out, plain - out, out)]
    lse_error = jnp.where(there[:, None], jnp.abs(mine(result.lse) - lse), 0).max()

    pad = -exact.shape[2] % BLOCK
    exact = jnp.where(there[:, None, None], exact, 0)
    largest = jnp.pad(exact, ((0, 0), (0, 0), (0, pad))).reshape(BLOCK, group, -1, BLOCK).max(3)  # [64, G, Sb]
    scores_error = jnp.zeros(())
    if result.block_scores is not None:
        heads = jax.lax.dynamic_slice_in_dim(result.block_scores[sequence], kv_head * group, group, axis=0)
        scores_error = jnp.maximum(scores_error, _scores_error(heads[:, row], largest.max(0)))
    if result.token_scores is not None:
        completed = jnp.arange(largest.shape[2])[None] < position[:, None] // BLOCK
        truth = jnp.where(completed, largest.max(1), 0)
        rows = result.token_scores[sequence, kv_head].at[token].get(mode="clip")
        scores_error = jnp.maximum(scores_error, _scores_error(jnp.where(there[:, None], rows, 0), truth))
    return jnp.stack([x.sum() for x in squares]), lse_error, scores_error


def _scores_error(got: Float32[Array, "n Sb"], truth: Float32[Array, "n Sb"]) -> Float32[Array, ""]:
    total = truth.sum(-1, keepdims=True)
    truth = truth / jnp.where(total > 0, total, 1)
    largest = truth.max(-1, keepdims=True)
    return (jnp.abs(got - truth) / jnp.where(largest > 0, largest, 1)).max()

"""Whether a result of an attention operation is right, answered on a few rows, so that it is cheap at any length."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from pallas_kernels.block_ground_truth.api import AttentionWithScores
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.online_softmax import dot, finite
from pallas_kernels.precision import rounded
from seer_jax.bench.harness.measurement import Outcome

ROWS_CHECKED = 8
UNTUNED = {"xla_gpu_autotune_level": 0}  # a check runs once: trying out its products takes longer than they do
FLOAT32 = float(np.finfo(np.float32).eps)
# A block too many or too few moves lse by 5e-4 in rows of 2048 blocks, those of 128k tokens.
LSE_BOUND = 1e-4
SCORES_BOUND = 1e-4


class AttentionCall(NamedTuple):
    """Arguments of an attention operation, whichever it is.

    Fields:
      q: T queries of each of B sequences.
      k, v: at least B rows; sequence i reads row i.
      blocks: the blocks that each query block sees; all causal ones where the operation takes no lists.
      query_offset: position of the first query, one for all sequences or one each.
      lengths: keys of each sequence.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "P S K D"]
    v: Float[Array, "P S K D"]
    blocks: BlockIndices
    query_offset: Int[Array, "*B"]
    lengths: Int[Array, "B"]


class Errors(NamedTuple):
    """How far a result is from the definition in float32, on sampled rows.

    Fields:
      out: of the output, relative (root of the sum of squares).
      plain: of attention in the dtype of the inputs without any rearrangement, on the same rows.
      lse: largest difference.
      scores: largest difference of the scores that were asked for, over the largest score of the row; None where none were.
    """

    out: float
    plain: float
    lse: float
    scores: float | None


def check_result(
    key: PRNGKeyArray, call: AttentionCall, first: AttentionWithScores, second: AttentionWithScores
) -> Outcome:
    """Holds a result against float32 on a few rows at random, and two runs of the same call against each other.

    Returns:
      the errors, and what is wrong.
    """
    errors = sampled_errors(key, call, first)
    results = {"error": errors.out, "plain_error": errors.plain, "lse_error": errors.lse}
    if errors.scores is not None:
        results["scores_error"] = errors.scores
    return Outcome(results, failure=find_fault(errors, call, first, second))


def find_fault(
    errors: Errors, call: AttentionCall, first: AttentionWithScores, second: AttentionWithScores
) -> str | None:
    """What is wrong with the results of two runs of the same call."""
    if not _outside_is_empty(call, first):
        return "output and lse must be 0 and -inf for queries beyond their sequence, and finite for all others"
    if not errors.out <= 2 * errors.plain + 4 * FLOAT32:
        return f"the output errs by {errors.out:.2e}; twice plain attention's {errors.plain:.2e} are allowed"
    if not errors.lse <= LSE_BOUND:
        return f"lse errs by {errors.lse:.2e}; {LSE_BOUND:.0e} is allowed"
    if errors.scores is not None and not errors.scores <= SCORES_BOUND:
        return f"scores err by {errors.scores:.2e} of a row's largest; {SCORES_BOUND:.0e} is allowed"
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)):
        return "two runs on the same arrays differ"
    return None


@jax.jit
def _outside_is_empty(call: AttentionCall, result: AttentionWithScores) -> Bool[Array, ""]:
    position = _offsets(call)[:, None] + jnp.arange(call.q.shape[1])[None]
    inside = (position < call.lengths[:, None])[..., None]
    good = jnp.where(inside, jnp.isfinite(result.lse), result.lse == -jnp.inf).all()
    good &= jnp.where(inside[..., None], jnp.isfinite(result.output), result.output == 0).all()
    for scores in jax.tree.leaves((result.block_scores, result.token_scores)):
        good &= jnp.isfinite(scores).all()
    return good


def sampled_errors(key: PRNGKeyArray, call: AttentionCall, result: AttentionWithScores) -> Errors:
    """Errors on a few rows at random, a sequence's last one among them, each computed over the keys that its list names.

    A row is a block of queries in one head; where there are scores, in all heads of a key/value head.
    """
    out, plain, lse, scores = _sampled_errors(key, call, result)
    return Errors(float(out), float(plain), float(lse), None if scores is None else float(scores))


@functools.partial(jax.jit, compiler_options=UNTUNED)
def _sampled_errors(
    key: PRNGKeyArray, call: AttentionCall, result: AttentionWithScores
) -> tuple[Float32[Array, ""] | None, ...]:
    (batch, tokens, heads, _), scored = call.q.shape, bool(jax.tree.leaves(result[2:]))
    group = heads // call.k.shape[2] if scored else 1
    keys = jax.random.split(key, 3)
    sequence = jax.random.randint(keys[0], (ROWS_CHECKED,), 0, batch)
    first_head = group * jax.random.randint(keys[1], (ROWS_CHECKED,), 0, heads // group)
    begun = -(-jnp.clip(call.lengths - _offsets(call), 1, tokens) // call.blocks.block_size)[sequence]
    row = jax.random.randint(keys[2], (ROWS_CHECKED,), 0, begun).at[0].set(begun[0] - 1)

    def one(place: tuple[Array, Array, Array]) -> tuple[Array, Array, Array | None]:
        i, first_head, row = place
        truth = jax.lax.map(lambda head: _true_row(call, i, head, row, scored), first_head + jnp.arange(group))
        token = truth.token[0]

        def mine(x: Array) -> Array:  # [T, H, ...] of the sequence, as [group, b, ...]
            x = jax.lax.dynamic_slice_in_dim(x[i], first_head, group, axis=1)
            return jnp.swapaxes(x.at[token].get(mode="clip"), 0, 1).astype(jnp.float32)

        counts = truth.lse > -jnp.inf
        differences = mine(result.output) - truth.out, truth.plain - truth.out, truth.out
        squares = jnp.stack([(jnp.where(counts[..., None], x, 0) ** 2).sum() for x in differences])
        lse = jnp.where(counts, jnp.abs(mine(result.lse) - truth.lse), 0).max()
        return squares, lse, _scores_error(call, result, place, truth) if scored else None

    squares, lse, scores = jax.lax.map(one, (sequence, first_head, row))
    wrong, plain_wrong, size = jnp.sqrt(squares.sum(0))
    return wrong / size, plain_wrong / size, lse.max(), None if scores is None else scores.max()


class _Row(NamedTuple):
    """The truth about a block of queries in one head.

    Fields:
      out, lse: in float32; 0 and -inf for a query that sees no key.
      plain: output of plain attention in the dtype of the inputs.
      largest: largest weight of each query in each block on the list; None where it is not asked for.
      token: numbers of the queries.
    """

    out: Float32[Array, "*G b D"]
    lse: Float32[Array, "*G b"]
    plain: Float32[Array, "*G b D"]
    largest: Float32[Array, "*G b N"] | None
    token: Int32[Array, "*G b"]


def _true_row(
    call: AttentionCall, i: Int32[Array, ""], h: Int32[Array, ""], row: Int32[Array, ""], scored: bool
) -> _Row:
    q, k, v, blocks, _, lengths = call
    b, heads, lists = blocks.block_size, q.shape[2], blocks.counts.shape[1]
    index = (i, h * lists // heads, row)
    token = row * b + jnp.arange(b)
    position, ends = _offsets(call)[i] + token, jnp.minimum(lengths[i], k.shape[1])
    inside = (token < q.shape[1]) & (position < ends)
    listed = jnp.arange(blocks.width) < blocks.counts[index]
    key_position = (blocks.indices[index][:, None] * b + jnp.arange(b)[None]).reshape(-1)
    seen = jnp.repeat(listed, b) & (key_position < ends)
    mask = seen[None] & (key_position[None] <= position[:, None]) & inside[:, None]
    queries = q[i, :, h].at[token].get(mode="clip")
    keys, values = (x[i, :, h * k.shape[2] // heads].at[key_position].get(mode="clip") for x in (k, v))

    plain, _, _ = _attention(queries, keys, values, mask)
    out, lse, weights = _attention(*(x.astype(jnp.float32) for x in (queries, keys, values)), mask)
    largest = weights.reshape(b, -1, b).max(-1) if scored else None
    return _Row(out, lse, rounded(plain, v.dtype), largest, token)


def _attention(
    q: Float[Array, "b D"], k: Float[Array, "s D"], v: Float[Array, "s D"], mask: Bool[Array, "b s"]
) -> tuple[Float32[Array, "b D"], Float32[Array, "b"], Float[Array, "b s"]]:
    """(output, lse, weights) of plain attention: sums in float32, weights rounded to the dtype of the values."""
    scores = jnp.where(mask, dot("qd,sd->qs", q, k) * q.shape[-1] ** -0.5, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - finite(lse)[:, None]).astype(v.dtype)
    return dot("qs,sd->qd", weights, v), lse, weights


def _scores_error(call: AttentionCall, result: AttentionWithScores, place: Any, truth: _Row) -> Float32[Array, ""]:
    """Error of the scores of one block row, whose list names every causal block."""
    i, first_head, row = place
    assert truth.largest is not None
    token, (group, _, blocks) = truth.token[0], truth.largest.shape
    error = jnp.zeros(())
    if result.block_scores is not None:
        got = jax.lax.dynamic_slice_in_dim(result.block_scores[i], first_head, group)[:, row]
        error = jnp.maximum(error, _largest_error(got, truth.largest.max(1)))
    if result.token_scores is not None:
        completed = (_offsets(call)[i] + token) // call.blocks.block_size
        largest = jnp.where(jnp.arange(blocks)[None] < completed[:, None], truth.largest.max(0), 0)
        got = result.token_scores[i, first_head // group].at[token].get(mode="clip")
        got = jnp.where((token < call.q.shape[1])[:, None], got, 0)
        error = jnp.maximum(error, _largest_error(got, largest))
    return error


def _largest_error(got: Float32[Array, "n Sb"], largest: Float32[Array, "n Sb"]) -> Float32[Array, ""]:
    """Of scores against block maxima divided by their sum, over a row's largest."""
    total = largest.sum(-1, keepdims=True)
    truth = largest / jnp.where(total > 0, total, 1)
    largest = truth.max(-1, keepdims=True)
    return (jnp.abs(got - truth) / jnp.where(largest > 0, largest, 1)).max()


def _offsets(call: AttentionCall) -> Int32[Array, "B"]:
    return jnp.broadcast_to(call.query_offset, call.lengths.shape).astype(jnp.int32)

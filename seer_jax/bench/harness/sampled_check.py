"""Whether a result of an attention operation is right, answered on a few rows, so that it is cheap at any length."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from pallas_kernels import AttentionWithScores, BlockIndices
from pallas_kernels.block_sparse_attention.reference import computed_blocks
from pallas_kernels.block_sparse_attention.skipping import tile_queries
from pallas_kernels.online_softmax import dot, finite
from pallas_kernels.precision import rounded
from seer_jax.bench.harness.measurement import Outcome, Results

ROWS_CHECKED = 8
UNTUNED = {"xla_gpu_autotune_level": 0}  # a check runs once: trying out its products takes longer than they do
FLOAT32 = float(np.finfo(np.float32).eps)
# A block too many or too few moves lse by 5e-4 in rows of 2048 blocks, those of 128k tokens.
LSE_BOUND = 1e-4
SCORES_BOUND = 1e-4
# Relative to the threshold: where a block's weight comes as near to it, rounding decides whether the block is skipped.
NEAR_THRESHOLD = 1e-4


class AttentionCall(NamedTuple):
    """Arguments of an attention operation, whichever it is.

    Fields:
      q: T queries of each of B sequences.
      k, v: sequence i reads row i.
      blocks: the blocks that each query block sees; all causal ones where the operation takes no lists.
      query_offset: position of the first query, one for all sequences or one each.
      lengths: keys of each sequence.
      skip_threshold: see `block_sparse_attention`.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "P S K D"]
    v: Float[Array, "P S K D"]
    blocks: BlockIndices
    query_offset: Int[Array, "*B"]
    lengths: Int[Array, "B"]
    skip_threshold: Float32[Array, "*H"] | None = None

    @classmethod
    def dense(
        cls, q: Array, k: Array, v: Array, query_offset: Array, lengths: Array, *, block_size: int = 64
    ) -> "AttentionCall":
        """A call with every causal block on its lists."""
        offset, shape = jnp.broadcast_to(query_offset, lengths.shape), (q.shape[1], k.shape[1])
        blocks = BlockIndices.all_causal(*shape, block_size=block_size, query_offset=offset, batch=len(q))
        return cls(q, k, v, blocks, query_offset, lengths)

    @property
    def positions(self) -> Int32[Array, "B T"]:
        """Of the queries."""
        offsets = jnp.broadcast_to(self.query_offset, self.lengths.shape)
        return offsets[:, None] + jnp.arange(self.q.shape[1])[None]


def check_result(
    key: PRNGKeyArray,
    call: AttentionCall,
    first: AttentionWithScores,
    second: AttentionWithScores,
    *,
    kept: Sequence[Int32[Array, "B H tiles"]] = (),
    statistic: str = "max",
) -> Outcome:
    """Holds a result against float32 on a few blocks of queries at random, and two runs of the same call against each other.

    Where blocks are skipped, tiles of queries in which rounding decides about a block are left out.

    Args:
      key: of the choice of blocks.
      call, first, second: the call and what two runs of it gave.
      kept: how many blocks each tile did not skip in the two runs.
      statistic: what scores are of, see `attention_with_block_scores`.

    Returns:
      what is wrong, and the errors: `error` of the output, relative (root of the sum of squares); `plain_error`, that of plain
      attention in the dtype of the inputs; `lse_error`, the largest difference; where there are scores `scores_error`, their
      largest difference over the largest score of the row; with `kept` `kept_error`, the largest difference.
    """
    sampled = _sampled_errors(key, call, first, kept[0] if kept else None, statistic)
    errors: Results = {name: float(error) for name, error in sampled.items()}
    failure = _find_fault(errors, call, first, second)
    if failure is None and kept and not jnp.array_equal(kept[0], kept[1]):
        failure = "two runs on the same arrays differ"
    return Outcome(errors, failure=failure)


def _find_fault(
    errors: Results, call: AttentionCall, first: AttentionWithScores, second: AttentionWithScores
) -> str | None:
    error, plain, lse, scores = (errors.get(f"{kind}error") or 0.0 for kind in ("", "plain_", "lse_", "scores_"))
    if not _outside_is_empty(call, first):
        return "output and lse must be 0 and -inf for queries beyond their sequence, and all others finite"
    if not error <= 2 * plain + 4 * FLOAT32:
        return f"the output errs by {error:.2e}; twice plain attention's {plain:.2e} are allowed"
    if not lse <= LSE_BOUND:
        return f"lse errs by {lse:.2e}; {LSE_BOUND:.0e} is allowed"
    if not scores <= SCORES_BOUND:
        return f"scores err by {scores:.2e} of a row's largest; {SCORES_BOUND:.0e} is allowed"
    if (kept := errors.get("kept_error")) is not None and kept != 0:
        return f"a tile's number of blocks that are not skipped errs by {kept:.0f}; 0 is allowed"
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)):
        return "two runs on the same arrays differ"
    return None


@jax.jit
def _outside_is_empty(call: AttentionCall, result: AttentionWithScores) -> Bool[Array, ""]:
    inside = (call.positions < call.lengths[:, None])[..., None]
    good = jnp.where(inside, jnp.isfinite(result.lse), result.lse == -jnp.inf).all()
    good &= jnp.where(inside[..., None], jnp.isfinite(result.output), result.output == 0).all()
    return good & jnp.array([jnp.isfinite(scores).all() for scores in jax.tree.leaves(result[2:])]).all()


@functools.partial(jax.jit, static_argnames="statistic", compiler_options=UNTUNED)
def _sampled_errors(
    key: PRNGKeyArray, call: AttentionCall, result: AttentionWithScores, kept: Array | None, statistic: str
) -> dict[str, Array]:
    (batch, tokens, _, _), b = call.q.shape, call.blocks.block_size
    key_sequence, key_row = jax.random.split(key)
    sequence = jax.random.randint(key_sequence, (ROWS_CHECKED,), 0, batch)
    begun = -(-jnp.clip(call.lengths - call.positions[:, 0], 1, tokens) // b)  # rows that begin within the sequence
    row = jax.random.randint(key_row, (ROWS_CHECKED,), 0, begun[sequence]).at[0].set(begun[sequence[0]] - 1)

    def one(place: tuple[Array, Array]) -> tuple[Array, Array, list[Array], list[Array]]:
        i, row = place
        token = row * b + jnp.arange(min(b, tokens))
        out, lse, plain, weights, computed = _true_rows(call, i, row, token)
        got_out, got_lse = (x[i].at[token].get(mode="clip").astype(jnp.float32) for x in result[:2])
        counts, kept_errors = lse > -jnp.inf, []
        if computed is not None:
            counts &= jnp.repeat(computed.sure, tile_queries(b), axis=1)[:, : len(token)].T
            if kept is not None:
                tile = row * computed.sure.shape[1] + jnp.arange(computed.sure.shape[1])
                got = kept[i].at[:, tile].get(mode="fill", fill_value=0)
                kept_errors.append(jnp.where(computed.sure, jnp.abs(got - computed.blocks.sum(-1)), 0).max())
        squares = [jnp.where(counts[..., None], x, 0) ** 2 for x in (got_out - out, plain - out, out)]
        lse_error = jnp.where(counts, jnp.abs(got_lse - lse), 0).max()
        score_errors = _score_errors(call, result, i, row, token, weights, statistic)
        return jnp.stack([x.sum() for x in squares]), lse_error, score_errors, kept_errors

    squares, lse_error, score_errors, kept_errors = jax.lax.map(one, (sequence, row))
    wrong, plain_wrong, size = jnp.sqrt(squares.sum(0))
    errors = {"error": wrong / size, "plain_error": plain_wrong / size, "lse_error": lse_error.max()}
    others = {"scores_error": score_errors, "kept_error": kept_errors}
    return errors | {name: jnp.stack(found).max() for name, found in others.items() if found}


class _Computed(NamedTuple):
    """Blocks that tiles of queries do not skip, and for which tiles this is sure."""

    blocks: Bool[Array, "H tiles Sb"]
    sure: Bool[Array, "H tiles"]


def _true_rows(
    call: AttentionCall, i: Array, row: Array, token: Array
) -> tuple[
    Float32[Array, "b H D"], Float32[Array, "b H"], Float32[Array, "b H D"], Float32[Array, "b H S"], _Computed | None
]:
    """(output, lse, output of plain attention in the dtype of the inputs, weights, what is not skipped) of a block of queries."""
    (_, tokens, heads, _), num_keys, b = call.q.shape, call.k.shape[1], call.blocks.block_size
    lists = BlockIndices(call.blocks.counts[i, :, row], call.blocks.indices[i, :, row], b)
    listed = jnp.repeat(lists.to_mask(-(-num_keys // b)), b, axis=1)[:, :num_keys]
    position, key = call.positions[i].at[token].get(mode="clip"), jnp.arange(num_keys)
    inside = (token < tokens) & (position < call.lengths[i])
    mask = inside[:, None] & (key[None] <= position[:, None]) & (key < call.lengths[i])[None]
    mask = mask[:, None] & jnp.repeat(listed, heads // len(listed), axis=0)[None]  # [b, H, S]
    inputs, computed = (call.q[i].at[token].get(mode="clip"), call.k[i], call.v[i]), None
    q, k, v = (x.astype(jnp.float32) for x in inputs)
    if call.skip_threshold is not None:
        computed = _computed(_scores(q, k, mask), b, jnp.broadcast_to(call.skip_threshold, heads))
        spread = jnp.repeat(jnp.repeat(computed.blocks, tile_queries(b), axis=1), b, axis=2)
        mask &= spread[:, : len(token), :num_keys].transpose(1, 0, 2)
    plain, _, _ = _attention(*inputs, mask)
    out, lse, weights = _attention(q, k, v, mask)
    return out, lse, rounded(plain, call.v.dtype), weights, computed


def _computed(scores: Float32[Array, "b H S"], b: int, threshold: Float32[Array, "H"]) -> _Computed:
    scores = scores.transpose(1, 0, 2)[None]
    blocks, fewer = (computed_blocks(scores, b, threshold * x)[0] for x in (1 - NEAR_THRESHOLD, 1 + NEAR_THRESHOLD))
    return _Computed(blocks, (blocks == fewer).all(-1))


def _attention(
    q: Float[Array, "b H D"], k: Float[Array, "S K D"], v: Float[Array, "S K D"], mask: Bool[Array, "b H S"]
) -> tuple[Float32[Array, "b H D"], Float32[Array, "b H"], Float[Array, "b H S"]]:
    """(output, lse, weights) of plain attention: sums in float32, weights rounded to the dtype of the values."""
    scores = _scores(q, k, mask)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - finite(lse)[..., None]).astype(v.dtype)
    out = dot("tkgs,skd->tkgd", weights.reshape(len(q), k.shape[1], -1, len(k)), v)
    return out.reshape(q.shape), lse, weights


def _scores(q: Float[Array, "b H D"], k: Float[Array, "S K D"], mask: Bool[Array, "b H S"]) -> Float32[Array, "b H S"]:
    """Scores before softmax, -inf where the mask hides a key."""
    scores = dot("tkgd,skd->tkgs", q.reshape(len(q), k.shape[1], -1, q.shape[-1]), k)
    return jnp.where(mask, scores.reshape(mask.shape) * q.shape[-1] ** -0.5, -jnp.inf)


def _score_errors(
    call: AttentionCall, result: AttentionWithScores, i: Array, row: Array, token: Array, weights: Array, statistic: str
) -> list[Array]:
    """Largest errors of the scores that were asked for, over a row's largest; every causal block must be on its list."""
    b, kv_heads, errors = call.blocks.block_size, call.k.shape[2], []
    of_keys, of_heads = (jnp.sum, jnp.mean) if statistic == "mass" else (jnp.max, jnp.max)
    padded = jnp.pad(weights, ((0, 0), (0, 0), (0, -weights.shape[-1] % b)))
    of_blocks = of_keys(padded.reshape(*weights.shape[:2], -1, b), axis=-1)
    if result.block_scores is not None:
        errors.append(_over_largest(result.block_scores[i, :, row], of_blocks.max(0)))
    if result.token_scores is not None:
        completed = jnp.arange(of_blocks.shape[-1])[None] < (call.positions[i].at[token].get(mode="clip") // b)[:, None]
        truth = of_heads(of_blocks.reshape(len(token), kv_heads, -1, of_blocks.shape[-1]), axis=2)
        got = jnp.swapaxes(result.token_scores[i].at[:, token].get(mode="clip"), 0, 1)
        there = (token < call.q.shape[1])[:, None, None]
        errors.append(_over_largest(jnp.where(there, got, 0), jnp.where(completed[:, None], truth, 0)))
    return errors


def _over_largest(got: Float32[Array, "*n Sb"], weights: Float32[Array, "*n Sb"]) -> Float32[Array, ""]:
    """Error of scores, which are the weights of blocks over their sum, relative to the largest of the row."""
    total = weights.sum(-1, keepdims=True)
    truth = weights / jnp.where(total > 0, total, 1)
    scale = truth.max(-1, keepdims=True)
    return (jnp.abs(got - truth) / jnp.where(scale > 0, scale, 1)).max()

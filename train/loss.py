"""Losses of the gates and of the language model, and block recall."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from seer_jax.sharding.shard import Shard
from seer_jax.sharding.vocabulary import log_probabilities, score_targets

RECALL_ROWS = 128  # block recall sorts rows, so it looks at a sample of them
LM_CHUNK = 512  # tokens whose logits are held at once


@jax.custom_vjp
def row_kl(target: Float[Array, "*b Sb"], logits: Float[Array, "*b Sb"]) -> Float32[Array, "*b"]:
    """KL(target || softmax(logits)) of each row: sum_j target_j (log target_j - log softmax(logits)_j).

    The authors' release takes the mean of `target * (log target - log_softmax)` over all elements, columns included, and multiplies by
    10. Its loss of the same rows is 10 / Sb times ours (Sb columns, masked ones counted), a scale that Adam nearly cancels.

    Args:
      target: rows that sum to 1, or to 0, in which case loss and gradient are 0. A constant: it gets no gradient.
      logits: -inf where a block cannot be chosen; the target is 0 there.

    Returns:
      float32, in nats. NaN where an input is NaN, which is not treated as a mask.
    """
    return _row_kl(target, logits)[0]


def _row_kl(target: jax.Array, logits: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The divergence, and what its gradient needs: the arguments and each row's log-sum-exp, no further array."""
    masked = logits == -jnp.inf
    total = jax.nn.logsumexp(_finite(logits), axis=-1)
    log_probability = jnp.where(masked, 0.0, logits.astype(jnp.float32) - total[..., None])
    log_target = jnp.log(jnp.where(target == 0, 1.0, target))
    return (target * (log_target - log_probability)).sum(-1), (target, logits, total)


def _row_kl_gradient(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[None, jax.Array]:
    target, logits, total = saved
    probability = jnp.where(logits == -jnp.inf, 0.0, jnp.exp(_finite(logits) - total[..., None]))
    gradient = cotangent[..., None] * (probability * target.sum(-1, keepdims=True) - target)
    return None, gradient.astype(logits.dtype)


row_kl.defvjp(_row_kl, _row_kl_gradient)


def _finite(logits: jax.Array) -> jax.Array:
    """Float32 logits with the lowest finite value in place of -inf: a row of -inf alone has no softmax."""
    return jnp.where(logits == -jnp.inf, jnp.finfo(jnp.float32).min, logits.astype(jnp.float32))


def sequence_lengths(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], block_size: int
) -> Int[Array, "B T"]:
    """Length in tokens of the sequence that each token belongs to; undefined at padding."""
    segments = -(-segment_ids.shape[1] // block_size) + 1  # a sequence takes at least one block

    def one(ids: jax.Array, position: jax.Array) -> jax.Array:
        return jax.ops.segment_max(position + 1, ids, num_segments=segments)[ids]

    return jax.vmap(one)(segment_ids, positions)


def prefill_rows(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], *, block_size: int, skip: float
) -> Bool[Array, "B Tb"]:
    """Block rows in the prefill loss: all but the first floor(skip * blocks) of each sequence."""
    lengths = sequence_lengths(segment_ids, positions, block_size)[:, ::block_size]
    blocks = -(-lengths // block_size)
    first = jnp.floor(skip * blocks).astype(jnp.int32)
    return (segment_ids[:, ::block_size] > 0) & (positions[:, ::block_size] // block_size >= first)


def decode_rows(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], *, block_size: int, skip: float
) -> Bool[Array, "B T"]:
    """Tokens in the decode loss: all but the first floor(skip * length), and all but the first block, of each sequence."""
    lengths = sequence_lengths(segment_ids, positions, block_size)
    first = jnp.floor(skip * lengths).astype(jnp.int32)
    return (segment_ids > 0) & (positions >= jnp.maximum(first, block_size))


def row_weights(rows: Bool[Array, "B R"], shard: Shard | None = None) -> Float32[Array, "B R"]:
    """The same weight for each row that counts; they sum to 1, or to 0 where no row counts.

    Args:
      rows: that count.
      shard: of the device that has these rows of the batch; the weights then sum to 1 over all devices. Those that share rows, each
        with some of the heads, share their weights: the sum of what they report is the mean over all heads.
    """
    count = rows.sum()
    if shard is None:
        return rows / jnp.maximum(count, 1).astype(jnp.float32)
    return rows / (jnp.maximum(shard.sum_over_rows(count), 1).astype(jnp.float32) * shard.sharing)


def block_recall(
    target: Float[Array, "B heads R Sb"],
    logits: Float[Array, "B heads R Sb"],
    weights: Float[Array, "B R"],
    density: float,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """What the gate's top blocks hold of the target, relative to the best choice of equally many blocks.

    A row with n visible blocks keeps ceil(density * n). Its recall is the sum of the target over the gate's top blocks divided by the sum
    over the blocks with the largest target; 1 is perfect. Long inputs are sampled, every (R / 128)-th row.

    Returns:
      (sum of weight * recall over the rows, sum of their weights); their quotient is the mean.
    """
    stride = recall_stride(target.shape[2])
    return recall_of_rows(target[:, :, ::stride], logits[:, :, ::stride], weights[:, ::stride], density)


def recall_stride(rows: int) -> int:
    """Stride n of the rows 0, n, 2 n, ... that block recall looks at."""
    return max(1, rows // RECALL_ROWS)


def recall_of_rows(
    target: Float[Array, "B heads R Sb"],
    logits: Float[Array, "B heads R Sb"],
    weights: Float[Array, "B R"],
    density: float,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """`block_recall` without sampling."""
    seen = (logits > -jnp.inf).sum(-1, keepdims=True)
    kept = jnp.ceil(density * seen - 1e-3)  # 0.6 of 5 blocks is 3, however float32 rounds
    kept = jnp.arange(target.shape[-1])[None, None, None] < kept
    by_gate = jnp.take_along_axis(target, jnp.argsort(-logits, axis=-1), axis=-1)
    by_truth = -jnp.sort(-target, axis=-1)
    best = jnp.where(kept, by_truth, 0).sum(-1)
    recall = jnp.where(kept, by_gate, 0).sum(-1) / jnp.where(best > 0, best, 1)
    return (recall.mean(1) * weights).sum(), weights.sum()


def lm_targets(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token after each one, and whether it belongs to the same sequence."""
    following, segment = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, segment_ids))
    return following, (segment == segment_ids) & (segment_ids > 0)


def lm_loss(
    hidden: Float[Array, "B T E"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    shard: Shard | None = None,
) -> Float32[Array, ""]:
    """Weighted sum of cross-entropies, in nats; logits exist for a chunk of tokens at a time, forward and backward.

    Args:
      hidden: after the final norm.
      head: output head.
      targets: token to predict at each position.
      weights: of each position.
      shard: of the device, which has the head of its part of the vocabulary; None: the head is whole.
    """

    def chunk_loss(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return (weights * score_targets(_logits(hidden, head), targets, shard)[0]).sum()

    return _sum_over_chunks(chunk_loss, hidden, targets, weights)


def distillation_loss(
    hidden: Float[Array, "B T E"],
    teacher: Float[Array, "B T E"],
    head: Float[Array, "V E"],
    weights: Float[Array, "B T"],
    shard: Shard | None = None,
) -> Float32[Array, ""]:
    """Weighted sum of KL(p || q) over the vocabulary, in nats, of the distributions p = softmax(teacher head^T) and
    q = softmax(hidden head^T); logits are float32 and exist for a chunk of tokens at a time, forward and backward.

    Args:
      hidden: after the final norm.
      teacher: likewise, a constant.
      head: output head of both.
      weights: of each position.
      shard: see `lm_loss`.
    """

    def chunk_loss(hidden: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
        log_p, log_q = (log_probabilities(_logits(x, head), shard) for x in (teacher, hidden))
        divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        return (weights * (divergence if shard is None else shard.sum_over_tensor(divergence))).sum()

    return _sum_over_chunks(chunk_loss, hidden, jax.lax.stop_gradient(teacher), weights)


def _logits(hidden: Float[Array, "B n E"], head: Float[Array, "V E"]) -> Float32[Array, "B n V"]:
    return jnp.einsum("bte,ve->btv", hidden, head, preferred_element_type=jnp.float32)


def _sum_over_chunks(function: Callable[..., jax.Array], *arrays: Shaped[Array, "B T ..."]) -> Float32[Array, ""]:
    """Sum of a function of tokens, `LM_CHUNK` of them at a time; 0 of padding must add 0. Chunks are computed anew in the backward pass."""
    tokens = arrays[0].shape[1]
    size = min(LM_CHUNK, tokens)
    pad = -tokens % size

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def body(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(function)(*chunk), None

    return jax.lax.scan(body, jnp.float32(0), tuple(map(chunks, arrays)))[0]

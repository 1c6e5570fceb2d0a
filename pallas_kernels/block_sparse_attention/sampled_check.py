"""Is a result of `block_sparse_attention` right? Answered on a few rows, so that it is cheap at any length."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from pallas_kernels.online_softmax import dot, finite
from pallas_kernels.precision import rounded

ROWS_CHECKED = 8
UNTUNED = {"xla_gpu_autotune_level": 0}  # a check runs once: trying out its products takes longer than they do
FLOAT32 = float(np.finfo(np.float32).eps)
# A block too many or too few moves lse by 5e-4 in rows of 2048 blocks, those of 128k tokens.
LSE_BOUND = 1e-4


class Errors(NamedTuple):
    """How far a result is from the definition in float32, on sampled rows.

    Fields:
      out: of the output, relative (root of the sum of squares).
      plain: of attention without any trick in the dtype of the inputs, on the same rows.
      lse: largest difference.
    """

    out: float
    plain: float
    lse: float


def find_fault(errors: Errors, arguments: dict[str, Any], first: Any, second: Any) -> str | None:
    """What is wrong with the results of two runs of the same call."""
    if not _outside_is_empty(*first, arguments["query_offset"], arguments["lengths"]):
        return "queries beyond their sequence must give 0 and lse -inf, all others finite numbers"
    if not errors.out <= 2 * errors.plain + 4 * FLOAT32:
        return f"the output errs by {errors.out:.2e}; twice plain attention's {errors.plain:.2e} are allowed"
    if not errors.lse <= LSE_BOUND:
        return f"lse errs by {errors.lse:.2e}; {LSE_BOUND:.0e} is allowed"
    if not all(jnp.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        return "two runs on the same arrays differ"
    return None


@jax.jit
def _outside_is_empty(
    out: Float[Array, "B T H D"], lse: Float32[Array, "B T H"], query_offset: Int[Array, "*B"], lengths: Int[Array, "B"]
) -> Bool[Array, ""]:
    position = jnp.broadcast_to(query_offset, lengths.sizes)[:, None] + jnp.arange(out.shape[1])[None]
    inside = (position < lengths[:, None])[..., None]
    good = jnp.where(inside, jnp.isfinite(lse), lse == -jnp.inf)
    return good.all() & jnp.where(inside[..., None], jnp.isfinite(out), out == 0).all()


def sampled_errors(
    key: PRNGKeyArray, arguments: dict[str, Any], out: Float[Array, "B T H D"], lse: Float32[Array, "B T H"]
) -> Errors:
    """Errors on a few rows (a block of queries of one head) at random, each computed over the keys that its list names."""
    return Errors(*map(float, _sampled_errors(key, arguments, out, lse)))


@functools.partial(jax.jit, compiler_options=UNTUNED)
def _sampled_errors(
    key: PRNGKeyArray, arguments: dict[str, Any], out: Float[Array, "B T H D"], lse: Float32[Array, "B T H"]
) -> tuple[Float32[Array, ""], ...]:
    q, blocks = arguments["q"], arguments["blocks"]
    batch, tokens, heads, _ = q.shape
    offsets = jnp.broadcast_to(arguments["query_offset"], (batch,))
    keys = jax.random.split(key, 3)
    sequence = jax.random.randint(keys[0], (ROWS_CHECKED,), 0, batch)
    head = jax.random.randint(keys[1], (ROWS_CHECKED,), 0, heads)
    rows = -(
        -jnp.clip(arguments["lengths"] - offsets, 1, tokens) // blocks.block_size
    )  # that begin within the sequence
    row = jax.random.randint(keys[2], (ROWS_CHECKED,), 0, rows[sequence])

    def one(place: tuple[Array, Array, Array]) -> Any:
        true_out, true_lse, plain, token = _row(arguments, offsets, *place)
        i, h, _ = place
        got, got_lse = (x[i, :, h].at[token].get(mode="clip").astype(jnp.float32) for x in (out, lse))
        counts = (token < tokens) & (true_lse > -jnp.inf)
        squares = [jnp.where(counts[:, None], x, 0) ** 2 for x in (got - true_out, plain - true_out, true_out)]
        return jnp.stack([x.sum() for x in squares]), jnp.where(counts, jnp.abs(got_lse - true_lse), 0).max()

    squares, lse_error = jax.lax.map(one, (sequence, head, row))
    wrong, plain_wrong, size = jnp.sqrt(squares.sum(0))
    return wrong / size, plain_wrong / size, lse_error.max()


def _row(
    arguments: dict[str, Any],
    offsets: Int32[Array, "B"],
    i: Int32[Array, ""],
    h: Int32[Array, ""],
    row: Int32[Array, ""],
) -> tuple[Float32[Array, "b D"], Float32[Array, "b"], Float32[Array, "b D"], Int32[Array, "b"]]:
    """(output, lse, output of plain attention in the dtype of the inputs, tokens) of one row."""
    q, k, v, blocks = (arguments[name] for name in ("q", "k", "v", "blocks"))
    b, heads, lists = blocks.block_size, q.shape[2], blocks.counts.shape[1]
    index = (i, h * lists // heads, row)
    token = row * b + jnp.arange(b)
    position = offsets[i] + token
    listed = jnp.arange(blocks.width) < blocks.counts[index]
    key_position = (blocks.indices[index][:, None] * b + jnp.arange(b)[None]).reshape(-1)
    ends = jnp.minimum(arguments["lengths"][i], k.shape[1])
    seen = jnp.repeat(listed, b) & (key_position < ends)
    mask = seen[None] & (key_position[None] <= position[:, None]) & (position < ends)[:, None]
    queries = q[i, :, h].at[token].get(mode="clip")
    keys, values = (x[i, :, h * k.shape[2] // heads].at[key_position].get(mode="clip") for x in (k, v))

    plain, _ = _attention(queries, keys, values, mask)
    queries, keys, values = (x.astype(jnp.float32) for x in (queries, keys, values))
    out, lse = _attention(queries, keys, values, mask)
    return out, lse, rounded(plain, v.dtype), token


def _attention(
    q: Float[Array, "b D"], k: Float[Array, "s D"], v: Float[Array, "s D"], mask: Bool[Array, "b s"]
) -> tuple[Float32[Array, "b D"], Float32[Array, "b"]]:
    """(output, lse) in float32, as of attention without any trick: sums in float32, weights rounded to the dtype of the values."""
    scores = jnp.where(mask, dot("qd,sd->qs", q, k) * q.shape[-1] ** -0.5, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - finite(lse)[:, None]).astype(v.dtype)
    return dot("qs,sd->qd", weights, v), lse

"""Whether gradients of attention are right, answered on a few blocks, so that it is cheap at any length."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from pallas_kernels import AttentionWithScores, BlockIndices
from pallas_kernels.online_softmax import dot, finite
from pallas_kernels.precision import rounded
from seer_jax.bench.harness.measurement import Outcome, Results
from seer_jax.bench.harness.sampled_check import FLOAT32, ROWS_CHECKED, UNTUNED, AttentionCall

INPUTS = ("q", "k", "v")


def check_gradients(
    key: PRNGKeyArray,
    call: AttentionCall,
    result: AttentionWithScores,
    d_out: Float[Array, "B T H D"],
    gradients: tuple[Array, ...],
    again: tuple[Array, ...],
) -> Outcome:
    """Holds gradients against float32 on a few random blocks of queries and of keys, and two runs against each other.

    Args:
      key: of the choice of blocks.
      call, result: the call and its output and lse, which are taken to be right.
      d_out: gradient in the output.
      gradients, again: gradients in q, k and v by two runs.

    Returns:
      what is wrong, and the errors, relative (root of the sum of squares): `q_error`, `k_error`, `v_error`, and `plain_error`, the
      largest of plain attention in the dtype of the inputs.
    """
    squares = _sampled_squares(key, call, result, d_out, gradients)
    wrong, plain, size = (jnp.sqrt(x) for x in squares)
    errors: Results = {f"{name}_error": float(x) for name, x in zip(INPUTS, wrong / size, strict=True)}
    bounds = dict(zip(INPUTS, 2 * plain / size + 4 * FLOAT32, strict=True))
    outcome = Outcome({**errors, "plain_error": float((plain / size).max())})
    for name, gradient, other in zip(INPUTS, gradients, again, strict=True):
        error, bound = errors[f"{name}_error"] or 0.0, float(bounds[name])
        if not bool(jnp.isfinite(gradient).all()):
            return outcome._replace(failure=f"the gradient of {name} must be finite")
        if not error <= bound:
            return outcome._replace(failure=f"the gradient of {name} errs by {error:.2e}; {bound:.2e} is allowed")
        if not bool(jnp.array_equal(gradient, other)):
            return outcome._replace(failure="two runs on the same arrays differ")
    return outcome


@functools.partial(jax.jit, compiler_options=UNTUNED)
def _sampled_squares(
    key: PRNGKeyArray, call: AttentionCall, result: AttentionWithScores, d_out: Array, gradients: tuple[Array, ...]
) -> Float32[Array, "3 3"]:
    """Sums of squares of the errors, those of plain attention, and the truth; each of the gradients in q, k and v."""
    (batch, _, heads, _), (_, num_keys, kv_heads, _), b = call.q.shape, call.k.shape, call.blocks.block_size
    sizes = batch, kv_heads, call.blocks.counts.shape[2], -(-num_keys // b)
    keys = jax.random.split(key, len(sizes))
    places = tuple(jax.random.randint(k, (ROWS_CHECKED,), 0, n) for k, n in zip(keys, sizes, strict=True))
    inner = (d_out.astype(jnp.float32) * result.output.astype(jnp.float32)).sum(-1)

    def one(place: tuple[Array, ...]) -> Float32[Array, "3 3"]:
        i, kv_head, row, block = place
        head = kv_head * (heads // kv_heads) + jnp.arange(heads // kv_heads)

        def read(x: Array, at: Array) -> Array:
            return x[i].at[at].get(mode="fill", fill_value=0)

        def part(query: Array, key: Array) -> _Part:
            q, d, lse, delta = (read(x, query)[:, head] for x in (call.q, d_out, result.lse, inner))
            k, v = (read(x, key)[:, kv_head] for x in (call.k, call.v))
            return _Part(q, k, v, d, lse, delta, _mask(call, i, head, query, key))

        queries, tokens = row * b + jnp.arange(b), block * b + jnp.arange(b)
        of_row, of_block = part(queries, jnp.arange(num_keys)), part(jnp.arange(call.q.shape[1]), tokens)
        got = read(gradients[0], queries)[:, head], *(read(x, tokens)[:, kv_head] for x in gradients[1:])
        plain, truth = (
            (*of_queries.gradients()[:1], *of_keys.gradients()[1:])
            for of_queries, of_keys in ((of_row, of_block), (of_row.exact(), of_block.exact()))
        )
        errors = zip(got, plain, truth, strict=True)
        squares = [[(x**2).sum() for x in (g.astype(jnp.float32) - t, p - t, t)] for g, p, t in errors]
        return jnp.asarray(squares).T

    return jax.lax.map(one, places).sum(0)


class _Part(NamedTuple):
    """n queries of the heads of a group, and s keys and values of their head.

    Fields:
      q, d_out: queries and gradients in their output.
      k, v: keys and values.
      lse, inner: of each query; the sum of its weights times their gradients.
      mask: which keys a query sees.
    """

    q: Float[Array, "n G D"]
    k: Float[Array, "s D"]
    v: Float[Array, "s D"]
    d_out: Float[Array, "n G D"]
    lse: Float32[Array, "n G"]
    inner: Float32[Array, "n G"]
    mask: Bool[Array, "n G s"]

    def exact(self) -> "_Part":
        """The same in float32."""
        q, k, v, d_out, *rest = (x if x.dtype == bool else x.astype(jnp.float32) for x in self)
        return _Part(q, k, v, d_out, *rest)

    def gradients(self) -> tuple[Float32[Array, "n G D"], Float32[Array, "s D"], Float32[Array, "s D"]]:
        """Gradients in q, k and v of what these queries and keys have to do with each other, by the dtype's products."""
        scale, dtype = self.q.shape[-1] ** -0.5, self.q.dtype
        scores = scale * dot("ngd,sd->ngs", self.q, self.k)
        weights = jnp.where(self.mask, jnp.exp(scores - finite(self.lse)[..., None]), 0)
        d_weights = dot("ngd,sd->ngs", self.d_out, self.v)
        d_scores = (scale * weights * (d_weights - self.inner[..., None])).astype(dtype)
        parts = (
            dot("ngs,sd->ngd", d_scores, self.k),
            dot("ngs,ngd->sd", d_scores, self.q),
            dot("ngs,ngd->sd", weights.astype(dtype), self.d_out),
        )
        return tuple(rounded(x, dtype) for x in parts)  # pyright: ignore[reportReturnType]


def _mask(
    call: AttentionCall, i: Array, head: Int32[Array, "G"], query: Int32[Array, "n"], key: Int32[Array, "s"]
) -> Bool[Array, "n G s"]:
    """Which of these keys these queries of sequence i see."""
    (_, lists, num_rows), b = call.blocks.counts.shape, call.blocks.block_size
    (_, tokens, heads, _), num_keys = call.q.shape, call.k.shape[1]
    rows = jnp.minimum(jnp.arange(-(-len(query) // b)) + query[0] // b, num_rows - 1)
    of = i, (head * lists // heads)[:, None], rows[None]
    listed = BlockIndices(call.blocks.counts[of], call.blocks.indices[of], b).to_mask(-(-num_keys // b))
    blocks = jnp.minimum(jnp.arange(-(-len(key) // b)) + key[0] // b, listed.shape[-1] - 1)
    listed = jnp.repeat(jnp.repeat(listed[..., blocks], b, axis=1), b, axis=2)[:, : len(query), : len(key)]
    position = call.positions[i].at[query].get(mode="clip")
    seen = (key[None] <= position[:, None]) & (key < call.lengths[i])[None]
    seen &= ((query < tokens) & (position < call.lengths[i]))[:, None]
    return listed.transpose(1, 0, 2) & seen[:, None]

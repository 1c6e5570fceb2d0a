"""Softmax-weighted sums over keys that arrive in tiles, in float32, for the XLA implementations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

_LOWEST = np.float32(np.finfo(np.float32).min / 2)  # finite, so that no inf - inf arises before the first key is seen


class OnlineSoftmax(NamedTuple):
    """Running sums, relative to the running maximum of each query.

    Fields:
      maximum: [..., M], largest score so far.
      total: [..., M], sum of exp(score - maximum).
      weighted: [..., M, D], sum of exp(score - maximum) * value.
    """

    maximum: Float32[Array, "*rows M"]
    total: Float32[Array, "*rows M"]
    weighted: Float32[Array, "*rows M D"]

    @classmethod
    def empty(cls, *shape: int) -> "OnlineSoftmax":
        """Sums over no keys; `shape` is (..., M, D)."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full(shape[:-1], _LOWEST), zeros[..., 0], zeros)

    def add(self, scores: Float32[Array, "*rows M W"], values: Float[Array, "*rows W D"]) -> "OnlineSoftmax":
        """Adds W keys; a score of -inf hides a key."""
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        weights = jnp.exp(scores - maximum[..., None])
        decay = jnp.exp(self.maximum - maximum)
        weighted = dot("...qs,...sd->...qd", weights.astype(values.dtype), values)
        return OnlineSoftmax(maximum, self.total * decay + weights.sum(-1), self.weighted * decay[..., None] + weighted)

    def finish(self) -> tuple[Float32[Array, "*rows M D"], Float32[Array, "*rows M"]]:
        """Output and lse of each query; 0 and -inf if it has seen no key."""
        seen = self.total != 0  # true for NaN, which the output must show
        total = jnp.where(seen, self.total, 1)
        out = jnp.where(seen[..., None], self.weighted / total[..., None], 0)
        return out, jnp.where(seen, self.maximum + jnp.log(total), -jnp.inf)


def dot(equation: str, x: Array, y: Array) -> Float32[Array, "..."]:
    """Einsum of two arrays of one dtype with float32 sums, and float32 products for float32 arrays.

    Accelerators multiply float32 in lower precision unless asked.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def log_sum_exp(x: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """log(sum(exp(x))) along an axis; -inf, with gradient 0, where every element is -inf."""
    largest = finite(jax.lax.stop_gradient(x.max(axis, keepdims=True)))
    total = jnp.exp(x - largest).sum(axis)
    seen = total != 0  # true for NaN, which the result must show
    return jnp.where(seen, largest.squeeze(axis) + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)


def finite(lse: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`lse` with 0 in place of -inf, so that exp(score - lse) is 0 instead of NaN for queries that see no key."""
    return jnp.where(lse > -jnp.inf, lse, 0)

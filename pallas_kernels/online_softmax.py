"""Softmax-weighted sums over keys that come a tile at a time, in float32: what the XLA implementations share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

_LOWEST = np.float32(np.finfo(np.float32).min / 2)  # finite, so that no inf - inf arises before the first key is seen


class OnlineSoftmax(NamedTuple):
    """The sums so far, relative to the running maximum of each query.

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
        """No key seen yet; `shape` is (..., M, D)."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full(shape[:-1], _LOWEST), zeros[..., 0], zeros)

    def add(self, scores: Float32[Array, "*rows M W"], values: Float[Array, "*rows W D"]) -> "OnlineSoftmax":
        """Takes in W more keys; a score of -inf hides the key."""
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        weights = jnp.exp(scores - maximum[..., None])
        decay = jnp.exp(self.maximum - maximum)
        weighted = dot("...qs,...sd->...qd", weights.astype(values.dtype), values)
        return OnlineSoftmax(maximum, self.total * decay + weights.sum(-1), self.weighted * decay[..., None] + weighted)

    def finish(self) -> tuple[Float32[Array, "*rows M D"], Float32[Array, "*rows M"]]:
        """Output and lse of each query; 0 and -inf where it has seen no key."""
        seen = self.total != 0  # NaN is no zero: damaged inputs must show in the output
        total = jnp.where(seen, self.total, 1)
        out = jnp.where(seen[..., None], self.weighted / total[..., None], 0)
        return out, jnp.where(seen, self.maximum + jnp.log(total), -jnp.inf)


def dot(equation: str, x: Array, y: Array) -> Float32[Array, "..."]:
    """An einsum of two arrays of one dtype that sums in float32.

    Who passes float32 wants float32 products, which accelerators only make when told to.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def finite(lse: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`lse` with 0 for -inf, so that exp(score - lse) is 0 and not NaN where nothing is seen."""
    return jnp.where(lse > -jnp.inf, lse, 0)

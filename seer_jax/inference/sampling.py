"""How the next token is drawn from the logits.

A sampling method is a frozen dataclass and a JAX pytree like the sparsity policies: numbers are leaves, so that another
temperature compiles nothing anew; `top_k` changes shapes and is static.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from seer_jax.checks import is_placeholder, whole_number

# New-style keys, or the raw ones of `jax.random.PRNGKey`.
Keys = Key[Array, "..."] | UInt32[Array, "... 2"]


class Sampling(abc.ABC):
    """Base of the sampling methods."""

    @abc.abstractmethod
    def sample(self, logits: Float[Array, "B V"], key: Keys | None = None) -> Int[Array, "B"]:
        """Draws one token for each row.

        Args:
          logits: any float dtype; -inf excludes a token, NaN is outside the domain.
          key: one key, from which row i takes `fold_in(key, i)`, or one key for each row. A row's token depends on its own
            logits and key alone.

        Returns:
          int32.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy(Sampling):
    """The most likely token; among equals the one of the lowest number."""

    def sample(self, logits: Float[Array, "B V"], key: Keys | None = None) -> Int[Array, "B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample(Sampling):
    """A token drawn from softmax(logits / temperature), first cut to the top_k best, then to the top_p mass of those.

    All arithmetic is float32. Where tokens are equal at a cut, those of lower number stay.

    Attributes:
      temperature: > 0 and finite; below 1 sharpens. For the limit 0 use `Greedy`.
      top_k: how many of the best tokens may be drawn, at least 1; None: all.
      top_p: in (0, 1]; the smallest set of best tokens whose probabilities reach this sum may be drawn, the best token
        always (nucleus sampling, arXiv 1904.09751). None or 1: all.
    """

    temperature: float | Float[Array, ""] = 1.0
    top_k: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    top_p: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        if not is_placeholder(self.temperature):
            _check_number("temperature", self.temperature)
            if not (self.temperature > 0 and math.isfinite(self.temperature)):
                raise ValueError(
                    f"A sampling temperature must be positive and finite; got {self.temperature}. Use Greedy() for temperature 0."
                )
        if self.top_k is not None:
            whole_number("top_k", self.top_k, "an integer of at least 1, or None for all tokens")
        if self.top_p is not None and not is_placeholder(self.top_p):
            _check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be a probability mass in (0, 1], or None for all; got {self.top_p}.")

    def sample(self, logits: Float[Array, "B V"], key: Keys | None = None) -> Int[Array, "B"]:
        if key is None:
            raise ValueError(
                f"{self} draws at random, so a key must be given; got None. Pass key=jax.random.key(seed)."
            )
        draw = jax.vmap(jax.random.categorical)
        keys = row_keys(key, logits.shape[0])
        scaled = logits.astype(jnp.float32) / self.temperature
        if self.top_k is None and self.top_p is None:
            return draw(keys, scaled).astype(jnp.int32)
        vocab_size = logits.shape[-1]
        best, tokens = jax.lax.top_k(scaled, min(self.top_k or vocab_size, vocab_size))
        if self.top_p is not None:
            best = jnp.where(nucleus(best, self.top_p), best, -jnp.inf)
        chosen = draw(keys, best)
        return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def row_keys(key: Keys, batch: int) -> Key[Array, "B"]:
    """One key for each row: those given, or `fold_in(key, row)` of a single one.

    Raises:
      ValueError: neither one key nor one for each row.
    """
    check_key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key must be one PRNG key, or one for each of the {batch} rows; got shape {key.shape}.")
    return key


def nucleus(best: Float[Array, "B N"], top_p: float | Float[Array, ""] | Float[Array, "B 1"]) -> jax.Array:
    """Which of the logits, sorted from the best down, belong to the smallest set whose mass reaches top_p."""
    mass = jnp.cumsum(jax.nn.softmax(best, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    return (before < top_p) | (jnp.asarray(top_p) >= 1)  # rounded sums may reach 1 before the last token


def check_key(key: Any) -> None:
    """Raises ValueError where `key` is no PRNG key, nor an array of them."""
    dtype = getattr(key, "dtype", None)
    known = dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)
    if not known or (dtype == jnp.uint32 and not 1 <= jnp.ndim(key) <= 2):
        raise ValueError(
            f"key must be a PRNG key, or one for each row; got {key!r}. Pass key=jax.random.key(0) for seed 0."
        )


def _check_number(name: str, value: Any) -> None:
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be one number; got {value!r}.")

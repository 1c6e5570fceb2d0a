"""Sampling methods of rows that share a program: each row draws as its own `Greedy` or `Sample` would."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from seer_jax.inference.sampling import Greedy, Sample, Sampling, nucleus

# What a row needs: the best token, a draw from all tokens, from a few of the best ones, from any number of them. Sorting all takes long.
GREEDY, PLAIN, FEW, CUT = range(4)
MOST_FEW = 128  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """The sampling methods of B rows as arrays, so that one program serves all of them.

    Attributes:
      kind: GREEDY, PLAIN, FEW or CUT.
      temperature, top_p: as in `Sample`; a top_p of 1 cuts nothing.
      top_k: as in `Sample`; the size of the vocabulary cuts nothing.
    """

    kind: Int[Any, "B"]
    temperature: Float32[Any, "B"]
    top_k: Int[Any, "B"]
    top_p: Float32[Any, "B"]

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "RowSampling":
        """One row's.

        Raises:
          ValueError: it is neither `Greedy` nor `Sample`.
        """
        kind, temperature, top_k, top_p = GREEDY, 1.0, vocab_size, 1.0
        if isinstance(sampling, Sample):
            temperature, top_k = float(sampling.temperature), min(sampling.top_k or vocab_size, vocab_size)
            kind = FEW if top_k <= MOST_FEW else CUT
            kind = PLAIN if sampling.top_k is None and sampling.top_p is None else kind
            top_p = 1.0 if sampling.top_p is None else float(sampling.top_p)
        elif not isinstance(sampling, Greedy):
            raise ValueError(
                f"The sampling of a request to an engine must be Greedy() or Sample(...), which its rows can mix; got {sampling!r}. "
                "Use generate."
            )
        integers, floats = (np.asarray([x], np.int32) for x in (kind, top_k)), (temperature, top_p)
        (kinds, top_ks), (temperatures, top_ps) = integers, (np.asarray([x], np.float32) for x in floats)
        return cls(kinds, temperatures, top_ks, top_ps)

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, "B"], active: Bool[Array, "B"]) -> Int[Array, "B"]:
        """Draws one token for each row; the work is that of the active row which needs most.

        Args:
          logits: as in `Sampling.sample`.
          keys: of the rows.
          active: rows whose tokens are used.
        """
        draw = jax.vmap(jax.random.categorical)
        vocab_size = logits.shape[-1]

        def greedy() -> Array:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def plain() -> Array:
            return jnp.where(self.kind == GREEDY, greedy(), draw(keys, scaled()).astype(jnp.int32))

        def cut(size: int) -> Array:
            # The draw is that of `Sample` with fewer tokens: random bits of a token depend on its number alone.
            best, tokens = jax.lax.top_k(scaled(), size)
            best = jnp.where(jnp.arange(size)[None] < self.top_k[:, None], best, -jnp.inf)
            chosen = draw(keys, jnp.where(nucleus(best, self.top_p[:, None]), best, -jnp.inf))
            drawn = jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
            return jnp.where(self.kind >= FEW, drawn, plain())

        def scaled() -> Array:
            return logits.astype(jnp.float32) / self.temperature[:, None]

        kinds = greedy, plain, lambda: cut(min(MOST_FEW, vocab_size)), lambda: cut(vocab_size)
        return jax.lax.switch(jnp.where(active, self.kind, GREEDY).max(), kinds)

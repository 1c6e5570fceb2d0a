"""Named calls of `select_blocks`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      shape: of the logits: [B, H, Tb, Sb] in prefill, [B, K, Sb] in decode.
      threshold, mass, top_k, max_blocks: the rule, see `select_blocks`.
      block_size: b.
      distinct: number of distinct logits, so that there are ties; None: no ties.
    """

    name: str
    shape: tuple[int, ...]
    threshold: float | None = None
    mass: float | None = None
    top_k: int | None = None
    max_blocks: int | None = None
    block_size: int = 64
    distinct: int | None = None

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments. Prefill rows see up to the diagonal block, which is kept; decode rows keep the first and the last block,
        and the last one has no logit.
        """
        rule = {name: getattr(self, name) for name in ("threshold", "mass", "top_k", "max_blocks", "block_size")}
        return self._arrays(key) | rule

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        logits = 3 * random_arrays(key, "float32", logits=self.shape)["logits"]
        if self.distinct is not None:
            logits = jnp.clip(jnp.round(logits), 0, self.distinct - 1)
        block = jax.lax.broadcasted_iota(jnp.int32, self.shape, len(self.shape) - 1)
        if len(self.shape) == 4:
            row = jax.lax.broadcasted_iota(jnp.int32, self.shape[2:], 0)
            return {"logits": logits, "keep": block[0, 0] == row, "visible": row[:, :1] + 1}
        last = block == self.shape[-1] - 1
        return {"logits": jnp.where(last, -jnp.inf, logits), "keep": (block == 0) | last}


REAL = (
    *(Case(f"llama-3.1-8b-{n}k-threshold", (1, 32, n * 16, n * 16), threshold=5e-4) for n in (8, 32, 128)),
    *(Case(f"llama-3.1-8b-{n}k-mass", (1, 32, n * 16, n * 16), mass=0.9) for n in (8, 32, 128)),
    *(Case(f"llama-3.1-8b-{n}k-top-k", (1, 32, n * 16, n * 16), top_k=n) for n in (8, 32, 128)),
    Case("qwen2.5-7b-100000-top-k", (1, 28, 1563, 1563), top_k=80),
    *(
        Case(f"qwen3-4b-b{batch}-{n}k-budget", (batch, 8, n * 16), max_blocks=n)
        for batch, n in ((1, 32), (8, 128), (1, 320))
    ),
)

TINY = (
    Case("prefill-threshold", (2, 4, 9, 9), threshold=0.1),
    Case("prefill-top-k", (1, 2, 33, 33), top_k=5),
    Case("prefill-top-k-ties", (1, 2, 33, 33), top_k=5, distinct=3),
    Case("prefill-mass", (2, 4, 9, 9), mass=0.7),
    Case("prefill-mass-ties", (1, 2, 33, 33), mass=0.437, distinct=3),
    Case("prefill-all", (1, 2, 7, 7)),
    Case("decode-budget", (3, 2, 40), max_blocks=6, block_size=16),
    Case("decode-budget-ties", (3, 2, 40), max_blocks=6, distinct=2),
    Case("decode-budget-of-all", (1, 2, 5), max_blocks=64),
    Case("decode-mass", (3, 2, 40), mass=0.9),
    Case("decode-threshold", (3, 2, 40), threshold=0.02, block_size=128),
)

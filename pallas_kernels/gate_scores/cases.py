"""Named calls of `score_blocks`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads, kv_heads, dim: H, K, C.
      rows, blocks: T and Sb.
      batch: B.
      causal, row_offset: see `score_blocks`.
      factor: standard deviation of the queries.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    rows: int
    blocks: int
    batch: int = 1
    causal: bool = True
    row_offset: int = 0
    factor: float = 1.0

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        return self._arrays(key) | {"causal": self.causal, "row_offset": self.row_offset}

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        queries, keys = (self.batch, self.rows, self.heads), (self.batch, self.blocks, self.kv_heads)
        arrays = random_arrays(key, "float32", queries=(*queries, self.dim), keys=(*keys, self.dim))
        return arrays | {"queries": self.factor * arrays["queries"]}


REAL = (
    *(Case(f"llama-3.1-8b-{n}k", 32, 32, 128, n * 16, n * 16) for n in (8, 32, 128)),
    Case("qwen2.5-7b-100000", 28, 4, 128, 1563, 1563),
    Case("llama-3.1-8b-128k-last-chunk", 32, 32, 128, 128, 2048, row_offset=1920),
    Case("qwen3-4b-decode-gate-32k", 8, 8, 128, 32 * 1024, 512, causal=False),
)

TINY = (
    Case("one-tile", 2, 2, 64, 64, 64),
    Case("later-rows", 2, 2, 64, 70, 200, row_offset=66),
    Case("grouped", 4, 2, 64, 130, 130, batch=2),
    Case("odd-sizes", 2, 1, 128, 75, 101, causal=False),
    Case("small-queries", 2, 2, 64, 80, 80, factor=1e-12),
    Case("large-queries", 2, 2, 64, 64, 66, factor=1e12),
    Case("few-blocks", 2, 2, 64, 100, 7, causal=False),
)

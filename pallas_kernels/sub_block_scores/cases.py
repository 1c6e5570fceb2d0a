"""Named calls of `score_sub_blocks`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads, kv_heads, dim: H, K, C.
      vectors, keys: Tu and Sw.
      per_row, per_block: query vectors of a row, key vectors of a block.
      batch: B.
      join, heads_join: how the key vectors of a block join, and the query heads of a key head.
      offset: rows before the first one. Vectors see the key vectors that begin no later than they end.
      segments: rows of each of the sequences that follow each other; None: one sequence.
      lengths: key vectors that each sequence of the batch sees at most; None: all. -1: causality alone decides.
      causal: whether vectors see earlier key vectors alone.
      factor: standard deviation of the queries.
      dtype: of the keys.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    vectors: int
    keys: int
    per_row: int = 1
    per_block: int = 1
    batch: int = 1
    join: str = "sum"
    heads_join: str = "each"
    offset: int = 0
    segments: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    causal: bool = True
    factor: float = 3.0
    dtype: str = "float32"

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        statics = dict(queries_per_row=self.per_row, keys_per_block=self.per_block, join=self.join)
        return self._arrays(key) | statics | {"heads": self.heads_join}

    def seen(self) -> np.ndarray:
        """[B or 1, Tu, 2]: which key vectors the query vectors see."""
        vector = np.arange(self.vectors) + self.offset * self.per_row
        end = -(-(vector + 1) * self.per_block // self.per_row) if self.causal else np.full(self.vectors, self.keys)
        end = np.minimum(end, np.array(self.lengths or (self.keys,))[:, None])
        starts = np.concatenate([[0], np.cumsum(self.segments or (self.vectors,))])
        rows = np.arange(self.vectors) // self.per_row
        first = starts[np.searchsorted(starts, rows, side="right") - 1] * self.per_block
        return np.stack([np.broadcast_to(first, end.shape), end], axis=-1).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        queries, keys = (self.batch, self.vectors, self.heads), (self.batch, self.keys, self.kv_heads)
        arrays = random_arrays(key, "float32", queries=(*queries, self.dim), keys=(*keys, self.dim))
        queries, keys = self.factor * arrays["queries"], arrays["keys"].astype(self.dtype)
        return {"queries": queries, "keys": keys, "seen": jnp.asarray(self.seen())}


def _prefill(
    name: str, tokens: int, query_pool: int, key_pool: int, *, kv_heads: int = 8, dim: int = 64, join: str = "sum"
) -> Case:
    """The prefill gate of Llama-3.1-8B with blocks of 64 tokens."""
    vectors, keys = tokens // query_pool, tokens // key_pool
    return Case(name, 32, kv_heads, dim, vectors, keys, 64 // query_pool, 64 // key_pool, join=join)


REAL = (
    _prefill("llama-3.1-8b-32k", 32 * 1024, 16, 16),
    _prefill("llama-3.1-8b-128k", 128 * 1024, 16, 16, dim=128),
    _prefill("llama-3.1-8b-128k-key-per-head", 128 * 1024, 16, 16, kv_heads=32),
    _prefill("llama-3.1-8b-32k-pools-of-8", 32 * 1024, 8, 8, dim=128),
    _prefill("llama-3.1-8b-100000-pools-of-64-and-16", 100_000, 64, 16),
    _prefill("llama-3.1-8b-32k-pools-of-32-and-16-max", 32 * 1024, 32, 16, join="max"),
)
DECODE = Case(
    "llama-3.1-8b-decode-8x128k",
    heads=32,
    kv_heads=8,
    dim=64,
    vectors=1,
    keys=16 * 1024,
    per_block=8,
    batch=8,
    heads_join="mean",
    causal=False,
    dtype="bfloat16",
)

TINY = (
    Case("one-vector-each", 4, 2, 64, 70, 70),
    Case("four-by-four", 4, 2, 64, 66, 66, 4, 4, batch=2),
    Case("two-by-eight", 2, 2, 64, 20, 80, 2, 8),
    Case("one-by-four-max", 2, 1, 64, 17, 66, 1, 4, join="max"),
    Case("eight-by-two", 2, 1, 128, 130, 34, 8, 2, join="max"),
    Case("sixteen-by-sixteen", 1, 1, 64, 50, 200, 16, 16),
    Case("later-rows", 2, 2, 64, 24, 72, 4, 4, offset=12),
    Case("packed", 1, 1, 64, 80, 80, 4, 4, segments=(3, 9, 8), lengths=(80, 42), batch=2),
    Case("large-products", 2, 1, 64, 32, 32, 4, 4, factor=60.0),
    Case("halves", 2, 1, 64, 20, 40, 2, 4, dtype="bfloat16"),
    Case(
        "decode-halves", 8, 2, 64, 1, 192, 1, 8, 2, heads_join="mean", lengths=(187, 8), causal=False, dtype="bfloat16"
    ),
    Case("decode-max", 4, 2, 64, 1, 64, 1, 4, heads_join="max", join="max", causal=False, dtype="bfloat16"),
    Case("tokens", 4, 1, 64, 40, 24, 2, 2, heads_join="mean"),
)

# The kernel takes bfloat16 keys alone while decoding.
FLOAT32_DECODE = Case(
    "float32-decode", 8, 2, 64, 1, 150, 1, 8, batch=2, heads_join="mean", lengths=(150, 64), causal=False
)

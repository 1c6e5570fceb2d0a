"""Named calls of `attention_with_block_scores`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import LLAMA_3_1_8B, QWEN3_4B, Heads, random_arrays

STATIC = ("block_size", "block_scores", "token_scores", "statistic")  # arguments that a program is compiled for


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads: H, K and D.
      length: S, and T unless `num_queries` says otherwise.
      batch: B.
      block_size: b.
      block_scores, token_scores: which scores are computed.
      statistic: what they are of: "max" or "mass".
      lengths: valid tokens of each row; all if None.
      segments: lengths of the sequences packed in each row, which start at multiples of b.
      num_queries: T; the queries are the last ones. None: all.
      dtype: dtype of q, k and v.
    """

    name: str
    heads: Heads
    length: int
    batch: int = 1
    block_size: int = 64
    block_scores: bool = True
    token_scores: bool = False
    statistic: str = "max"
    lengths: tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None
    num_queries: int | None = None
    dtype: str = "bfloat16"

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        statics = {name: getattr(self, name) for name in STATIC}
        return self._arrays(key) | statics

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        keys = self.batch, self.length, self.heads.kv_heads, self.heads.head_dim
        queries = self.batch, self.num_queries or self.length, self.heads.heads, self.heads.head_dim
        arguments = random_arrays(key, self.dtype, q=queries, k=keys, v=keys)
        if self.num_queries is not None:
            arguments["query_offset"] = jnp.int32(self.length - self.num_queries)
        if self.lengths is not None:
            arguments["lengths"] = jnp.asarray(self.lengths)
        if self.segments is not None:
            arguments["segment_ids"] = jnp.asarray(self._segment_ids())
        return arguments

    def _segment_ids(self) -> np.ndarray:
        row, start = np.zeros(self.length, np.int32), 0
        for number, size in enumerate(self.segments or ()):
            row[start : start + size] = number + 1
            start += -(-size // self.block_size) * self.block_size
        return np.tile(row, (self.batch, 1))


REAL = (
    *(Case(f"llama-3.1-8b-{n}k", LLAMA_3_1_8B, n * 1024) for n in (8, 32, 64)),
    Case("llama-3.1-8b-8k-ragged-batch", LLAMA_3_1_8B, 8000, batch=4, lengths=(8000, 7001, 4097, 64)),
    Case("qwen3-4b-32k-token-scores", QWEN3_4B, 32 * 1024, block_scores=False, token_scores=True),
    Case(
        "qwen3-4b-32k-packed", QWEN3_4B, 32 * 1024, block_scores=False, token_scores=True, segments=(20000, 9000, 3000)
    ),
    Case("qwen3-4b-64k-chunk", QWEN3_4B, 64 * 1024, block_scores=False, token_scores=True, num_queries=8192),
    Case("llama-3.1-8b-8k-blocks-of-128", LLAMA_3_1_8B, 8192, block_size=128, token_scores=True),
    Case("llama-3.1-8b-8k-attention-alone", LLAMA_3_1_8B, 8192, block_scores=False),
    Case("odd-length-head-dim-64", Heads(32, 8, 64), 5001, token_scores=True, dtype="float16"),
    Case("llama-3.1-8b-64k-by-mass", LLAMA_3_1_8B, 64 * 1024, statistic="mass"),
    Case(
        "qwen3-4b-64k-chunk-by-mass",
        QWEN3_4B,
        64 * 1024,
        block_scores=False,
        token_scores=True,
        statistic="mass",
        num_queries=8192,
    ),
    Case("blocks-of-128-by-mass", Heads(32, 8, 64), 5001, block_size=128, token_scores=True, statistic="mass"),
)

TINY = (
    Case("block-scores", Heads(4, 2, 64), 320, dtype="float32"),
    Case("token-scores", Heads(8, 1, 64), 150, block_size=16, block_scores=False, token_scores=True, dtype="float32"),
    Case("two-tiles", Heads(2, 2, 64), 600, block_size=128, token_scores=True, dtype="float32"),
    Case(
        "ragged",
        Heads(4, 2, 128),
        290,
        batch=3,
        block_size=32,
        token_scores=True,
        lengths=(290, 65, 0),
        dtype="float32",
    ),
    Case(
        "packed", Heads(4, 2, 64), 700, block_size=16, token_scores=True, segments=(300, 17, 64, 200), dtype="float32"
    ),
    Case("bf16", Heads(4, 1, 128), 256, token_scores=True),
    Case(
        "ragged-by-mass",
        Heads(4, 2, 64),
        290,
        batch=3,
        block_size=32,
        token_scores=True,
        statistic="mass",
        lengths=(290, 65, 0),
        dtype="float32",
    ),
    Case(
        "packed-by-mass",
        Heads(8, 2, 128),
        700,
        block_size=128,
        token_scores=True,
        statistic="mass",
        segments=(300, 17, 200),
        dtype="float32",
    ),
    Case("bf16-by-mass", Heads(4, 1, 64), 300, block_size=16, token_scores=True, statistic="mass"),
)

# For backends that take only half precision and blocks of 64 and 128 tokens.
HALF = (
    Case("half-block-scores", Heads(2, 1, 64), 330),
    Case("half-token-scores", Heads(4, 2, 128), 200, block_scores=False, token_scores=True),
    Case("half-ragged", Heads(2, 1, 64), 130, batch=3, token_scores=True, lengths=(130, 65, 0), dtype="float16"),
    Case("half-packed", Heads(2, 1, 64), 500, token_scores=True, segments=(100, 64, 17, 200)),
    Case("half-blocks-of-128", Heads(2, 1, 64), 500, block_size=128, token_scores=True, segments=(200, 150)),
    Case("half-block-scores-by-mass", Heads(2, 1, 128), 330, statistic="mass", dtype="float16"),
    Case("half-packed-by-mass", Heads(2, 1, 64), 260, token_scores=True, statistic="mass", segments=(100, 64, 17)),
    Case(
        "half-blocks-of-128-by-mass",
        Heads(2, 1, 64),
        500,
        block_size=128,
        token_scores=True,
        statistic="mass",
        segments=(200, 150),
    ),
    Case("half-attention-alone", Heads(2, 2, 128), 130, block_scores=False),
)

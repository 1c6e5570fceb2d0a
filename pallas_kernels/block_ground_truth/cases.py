"""Named calls of `attention_with_block_scores`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from pallas_kernels.shapes import LLAMA_3_1_8B, QWEN3_4B, Heads, random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads: H, K and D.
      length: T, which is S.
      batch: B.
      block_size: b.
      block_scores, token_scores: which scores are asked for.
      lengths: valid tokens of each row; all of them if None.
      segments: tokens of each sequence packed in a row, the same in every row; each starts at the next multiple of b.
      dtype: of q, k and v.
    """

    name: str
    heads: Heads
    length: int
    batch: int = 1
    block_size: int = 64
    block_scores: bool = True
    token_scores: bool = False
    lengths: tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        statics = {name: getattr(self, name) for name in ("block_size", "block_scores", "token_scores")}
        return self._arrays(key) | statics

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        keys = self.batch, self.length, self.heads.kv_heads, self.heads.head_dim
        queries = self.batch, self.length, self.heads.heads, self.heads.head_dim
        arguments = random_arrays(key, self.dtype, q=queries, k=keys, v=keys)
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
)

"""Named calls of `pool_blocks`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import LLAMA_3_1_8B, QWEN2_5_7B, random_arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads, dim: heads and D of the queries or keys.
      num_tokens: T.
      kinds: see `pool_blocks`.
      batch: B.
      block_size: b.
      lengths: valid tokens of each sequence; None: no `valid`.
      dtype: dtype of x.
    """

    name: str
    heads: int
    dim: int
    num_tokens: int
    kinds: tuple[str, ...]
    batch: int = 1
    block_size: int = 64
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        return self._arrays(key) | {"kinds": self.kinds, "block_size": self.block_size}

    @functools.partial(jax.jit, static_argnums=0)
    def _arrays(self, key: PRNGKeyArray) -> dict[str, Any]:
        x = random_arrays(key, self.dtype, x=(self.batch, self.num_tokens, self.heads, self.dim))["x"]
        if self.lengths is None:
            return {"x": x, "valid": None}
        return {"x": x, "valid": jnp.arange(self.num_tokens)[None] < jnp.asarray(self.lengths)[:, None]}


KEYS = ("max", "min", "avg")
REAL = (
    *(
        Case(f"llama-3.1-8b-{n}k-queries", LLAMA_3_1_8B.heads, 128, n * 1024, ("avg",), lengths=(n * 1000,))
        for n in (32, 128)
    ),
    *(
        Case(f"llama-3.1-8b-{n}k-keys", LLAMA_3_1_8B.kv_heads, 128, n * 1024, KEYS, lengths=(n * 1000,))
        for n in (32, 128)
    ),
    Case("llama-3.1-8b-128k-queries-pools-of-16", LLAMA_3_1_8B.heads, 128, 128 * 1024, ("avg",), block_size=16),
    Case("llama-3.1-8b-128k-keys-pools-of-8", LLAMA_3_1_8B.kv_heads, 128, 128 * 1024, KEYS, block_size=8),
    Case("qwen2.5-7b-100000-queries", QWEN2_5_7B.heads, 128, 100_000, ("avg",)),
    Case("qwen2.5-7b-100000-keys", QWEN2_5_7B.kv_heads, 128, 100_000, KEYS),
)

TINY = (
    Case("whole", 4, 64, 128, KEYS),
    Case("partial-block", 2, 128, 100, ("avg", "max"), block_size=16),
    Case("pools-of-8", 8, 128, 45, ("avg",), batch=2, lengths=(45, 13), block_size=8),
    Case("heads-of-96", 8, 96, 40, ("min", "avg"), block_size=16),
    Case("ragged", 4, 64, 150, KEYS, batch=3, lengths=(150, 64, 33), block_size=32),
    Case("nothing-valid", 8, 64, 64, ("min", "avg"), batch=2, lengths=(64, 0), block_size=16),
    Case("float32", 2, 128, 200, KEYS, block_size=128, dtype="float32"),
    Case("float16", 2, 128, 130, KEYS, batch=2, dtype="float16"),
)

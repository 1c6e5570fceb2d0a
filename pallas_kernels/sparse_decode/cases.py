"""Named calls of `sparse_decode_attention`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas_kernels.cases import QWEN3_4B, Heads, random_arrays, random_blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads: H, K and D.
      num_keys: S, the capacity of the cache.
      batch: B.
      block_size: b.
      density: share of the blocks before the current one that are kept.
      lengths: valid keys of each sequence; S if None.
      dtype: dtype of q, k and v.
    """

    name: str
    heads: Heads
    num_keys: int
    batch: int = 1
    block_size: int = 64
    density: float = 0.1
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    @functools.partial(jax.jit, static_argnums=0)
    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        keys = self.batch, self.num_keys, self.heads.kv_heads, self.heads.head_dim
        key_qkv, key_blocks = jax.random.split(key)
        queries = self.batch, self.heads.heads, self.heads.head_dim
        arguments = random_arrays(key_qkv, self.dtype, q=queries, k=keys, v=keys)
        lengths = jnp.asarray(self.lengths or (self.num_keys,) * self.batch)
        last = jnp.broadcast_to((lengths[:, None] - 1) // self.block_size, (self.batch, self.heads.kv_heads))
        num_blocks = -(-self.num_keys // self.block_size)
        blocks = random_blocks(key_blocks, last, num_blocks, block_size=self.block_size, density=self.density)
        return arguments | {"blocks": blocks, "lengths": lengths}


REAL = tuple(
    Case(f"qwen3-4b-b{batch}-{n}k", QWEN3_4B, n * 1024, batch=batch)
    for batch, n in ((1, 32), (1, 128), (8, 32), (8, 128), (16, 32))
)

TINY = (
    Case("group-of-4", Heads(8, 2, 128), 300, density=0.4, dtype="float32"),
    Case("one-head", Heads(8, 1, 64), 64, density=0.4, dtype="float32", block_size=16),
    Case("no-groups", Heads(2, 2, 64), 500, density=0.4, dtype="float32", block_size=128),
    Case("ragged", Heads(4, 2, 64), 203, batch=4, density=0.5, lengths=(203, 64, 1, 0), dtype="float32", block_size=32),
    Case("long-lists", Heads(4, 2, 64), 1300, density=0.9, dtype="float32", block_size=16),
    Case("bf16", Heads(4, 1, 128), 600, batch=2, density=0.4, lengths=(600, 77)),
)

HALF = (
    Case("half-group-of-4", Heads(8, 2, 128), 296, batch=2, density=0.4, lengths=(296, 77)),
    Case("half-no-groups", Heads(2, 2, 64), 160, density=0.5, block_size=16, dtype="float16"),
    Case("half-group-of-12", Heads(12, 1, 64), 320, density=0.5, block_size=128),
    Case("half-ragged", Heads(4, 2, 128), 160, batch=3, density=0.6, block_size=32, lengths=(33, 0, 160)),
    Case("half-many-tiles", Heads(2, 1, 64), 704, density=0.9),
)

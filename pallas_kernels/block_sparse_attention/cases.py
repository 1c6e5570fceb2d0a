"""Named calls of `block_sparse_attention`, for tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from pallas_kernels.cases import LLAMA_3_1_8B, QWEN2_5_7B, Heads, random_arrays, random_blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
      name: what a report calls it.
      heads: H, K and D.
      num_queries: T.
      num_keys: S; T if None.
      batch: B.
      lists: Hs, lists per query block: 1, K or H; H if None.
      block_size: b.
      density: share of the blocks before the diagonal that are kept.
      query_offset: position of the first query, one for the batch or one per sequence.
      lengths: valid keys of each sequence; all of them if None.
      dtype: dtype of q, k and v.
      peak: if above 0, a query or key is a quarter of a random vector plus `peak` times one that all of its block share, so that
        large scores come in blocks.
      skip_threshold: see api.py.
    """

    name: str
    heads: Heads
    num_queries: int
    num_keys: int | None = None
    batch: int = 1
    lists: int | None = None
    block_size: int = 64
    density: float = 0.1
    query_offset: int | tuple[int, ...] = 0
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    peak: float = 0.0
    skip_threshold: float | tuple[float, ...] | None = None

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random arguments of the call."""
        # The density is traced, so that one program draws the arguments of every density and threshold.
        drawn = dataclasses.replace(self, name="", density=0.0, skip_threshold=None)
        arguments = drawn._draw(key, jnp.float32(self.density))
        if self.skip_threshold is not None:
            arguments["skip_threshold"] = jnp.asarray(self.skip_threshold, jnp.float32)
        return arguments

    @functools.partial(jax.jit, static_argnums=0)
    def _draw(self, key: PRNGKeyArray, density: Float32[Array, ""]) -> dict[str, Any]:
        num_keys, b = self.num_keys or self.num_queries, self.block_size
        keys = self.batch, num_keys, self.heads.kv_heads, self.heads.head_dim
        key_qkv, key_blocks = jax.random.split(key)
        queries = self.batch, self.num_queries, self.heads.heads, self.heads.head_dim
        arguments = random_arrays(key_qkv, self.dtype, q=queries, k=keys, v=keys)
        if self.peak:
            for name, key in zip("qk", jax.random.split(key_qkv), strict=True):
                x = arguments[name]
                common = jax.random.normal(key, (x.shape[0], -(-x.shape[1] // b), *x.shape[2:]))
                common = self.peak * jnp.repeat(common, b, axis=1)[:, : x.shape[1]]
                arguments[name] = (x / 4 + common).astype(x.dtype)

        ends = jnp.minimum((jnp.arange(-(-self.num_queries // b)) + 1) * b, self.num_queries)
        ends = jnp.broadcast_to(jnp.asarray(self.query_offset), (self.batch,))[:, None, None] + ends[None, None]
        last = jnp.minimum((ends - 1) // b, -(-num_keys // b) - 1)
        last = jnp.broadcast_to(last, (self.batch, self.lists or self.heads.heads, last.shape[-1]))
        blocks = random_blocks(key_blocks, last, -(-num_keys // b), block_size=b, density=density)
        arguments |= {"blocks": blocks, "query_offset": jnp.asarray(self.query_offset)}
        if self.lengths is not None:
            arguments["lengths"] = jnp.asarray(self.lengths)
        return arguments


REAL = (
    *(Case(f"llama-3.1-8b-{n}k", LLAMA_3_1_8B, n * 1024, density=d) for n in (8, 32, 128) for d in (0.1,)),
    Case("llama-3.1-8b-32k-dense", LLAMA_3_1_8B, 32 * 1024, density=1.0),
    Case("llama-3.1-8b-32k-half", LLAMA_3_1_8B, 32 * 1024, density=0.5),
    Case("llama-3.1-8b-32k-group-lists", LLAMA_3_1_8B, 32 * 1024, lists=8),
    Case("llama-3.1-8b-32k-128", LLAMA_3_1_8B, 32 * 1024, block_size=128),
    Case("llama-3.1-8b-8k-ragged-batch", LLAMA_3_1_8B, 8000, batch=4, lengths=(8000, 7001, 4097, 64)),
    Case("llama-3.1-8b-32k-chunk", LLAMA_3_1_8B, 4096, 32 * 1024, query_offset=28 * 1024),
    Case("qwen2.5-7b-32k", QWEN2_5_7B, 32 * 1024),
)

TINY = (
    Case("own-lists", Heads(4, 2, 64), 256, density=0.4, dtype="float32"),
    Case("group-lists", Heads(4, 2, 64), 200, lists=2, density=0.4, dtype="float32", block_size=16),
    Case("one-list", Heads(8, 1, 128), 150, lists=1, density=0.4, dtype="float32", block_size=32),
    Case("no-groups", Heads(2, 2, 64), 300, density=0.4, dtype="float32", block_size=128),
    Case("ragged", Heads(4, 2, 64), 131, 171, batch=3, density=0.5, query_offset=(40, 0, 7), lengths=(171, 100, 0),
         dtype="float32", block_size=16),
    Case("bf16", Heads(4, 1, 64), 256, density=0.4),
    Case("bf16-ragged", Heads(4, 2, 128), 77, 205, lists=2, density=0.5, query_offset=128, lengths=(203,), block_size=128),
)  # fmt: skip

HALF = (
    Case("half-own", Heads(2, 1, 128), 200, density=0.5),
    Case("half-float16", Heads(4, 2, 64), 330, density=0.5, dtype="float16"),
    Case("half-group-lists", Heads(2, 1, 128), 200, lists=1, density=0.5),
    Case("half-128", Heads(2, 1, 64), 300, density=0.5, block_size=128),
    Case("half-ragged", Heads(2, 1, 64), 131, 271, batch=2, density=0.5, query_offset=(40, 7), lengths=(171, 30)),
    Case("half-ragged-group-lists", Heads(2, 1, 64), 131, 271, batch=2, lists=1, density=0.5, query_offset=(40, 7), lengths=(171, 30)),
    Case("half-ragged-128", Heads(2, 1, 64), 131, 371, batch=2, density=0.5, query_offset=(140, 7), lengths=(171, 30), block_size=128),
)  # fmt: skip

SKIPPING = (
    Case("skip-own", Heads(4, 2, 64), 300, density=0.8, dtype="float32", peak=2.0, skip_threshold=0.1),
    Case("skip-dense", Heads(4, 2, 64), 200, lists=1, density=1.0, dtype="float32", block_size=16, peak=2.0, skip_threshold=(0.0, 1e-3, 0.1, 1.0)),
    Case("skip-128", Heads(2, 1, 64), 700, lists=1, density=1.0, block_size=128, peak=2.0, skip_threshold=1e-2),
    Case("skip-ragged", Heads(4, 2, 64), 133, 301, batch=3, lists=2, density=0.7, query_offset=(140, 0, 7), lengths=(273, 100, 0),
         dtype="float32", block_size=32, peak=2.0, skip_threshold=1e-2),
)  # fmt: skip

SKIPPING_HALF = (
    Case("skip-half-ragged-dense", Heads(2, 1, 64), 131, 523, batch=2, lists=1, density=1.0, query_offset=(384, 130), lengths=(510, 250), peak=2.0, skip_threshold=1e-2),
    Case("skip-half-own", Heads(2, 1, 128), 460, density=0.9, peak=2.0, skip_threshold=(0.1, 0.0)),
    Case("skip-half-128", Heads(2, 1, 64), 601, lists=1, density=1.0, block_size=128, dtype="float16", peak=2.0, skip_threshold=1e-2),
    Case("skip-half-chunk", Heads(2, 1, 64), 68, 640, lists=1, density=1.0, query_offset=448, peak=2.0, skip_threshold=0.1),
)  # fmt: skip

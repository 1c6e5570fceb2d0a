"""`sparse_decode_attention` measured: results are checked before they are timed, with dense attention beside them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockIndices, select_blocks, sparse_decode_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.block_ground_truth.api import AttentionWithScores
from pallas_kernels.cases import Heads, large_random_array
from seer_jax.bench.harness.baseline import Baseline, dense_attention
from seer_jax.bench.harness.clock import floor_results, layers_beyond_cache, read_seconds, time_chain
from seer_jax.bench.harness.config import BLOCK
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.bench.harness.tables import DENSE, ERRORS, FLOOR, LISTED, MEMORY, MILLISECONDS, SPEEDUP, Table

DECODE_ATTENTION = Table(
    "decode kernel",
    "Attention kernel, new tokens",
    (LISTED, *ERRORS, MILLISECONDS, *FLOOR, DENSE, SPEEDUP, MEMORY),
)
DTYPE = jnp.bfloat16


def measure_decode_attention(
    heads: Heads,
    batches: Sequence[int],
    lengths: Sequence[int],
    densities: Sequence[float],
    implementation: Implementation | None = None,
    *,
    seed: int = 0,
) -> Iterator[Measurement]:
    """For each batch and length one measurement per density, and one of dense attention by the same operation."""
    for batch, length in itertools.product(batches, lengths):
        caches = Caches(heads, batch, length, tuple(densities), seed)
        for density in (*densities, None):
            case = f"{batch} x {length}, " + ("dense" if density is None else f"{density:g}")
            settings = dict(batch=batch, length=length, density=density, block_size=BLOCK, dtype=str(jnp.dtype(DTYPE)))
            settings |= dataclasses.asdict(heads)
            settings |= dict(layers=caches.layers(density), implementation=implementation)
            yield measure(
                DECODE_ATTENTION.name,
                case,
                settings,
                functools.partial(_check_and_time, caches, density, implementation),
                required=implementation is not None,
                needed_bytes=caches.needed_bytes,
            )


@dataclasses.dataclass(frozen=True)
class Caches:
    """Random caches of sequences of one length whose newest tokens attend, and lists of blocks for each layer.

    Arrays are drawn when they are needed.

    Attributes:
      heads: H, K and D.
      batch: B.
      length: S, keys of each sequence.
      densities: of the lists that are measured.
      seed: of the random numbers.
    """

    heads: Heads
    batch: int
    length: int
    densities: tuple[float, ...] = ()
    seed: int = 0

    @property
    def blocks(self) -> int:
        """Sb."""
        return -(-self.length // BLOCK)

    def listed(self, density: float) -> int:
        """Blocks on a list, the current and the first among them: as many as `TopK` keeps while decoding."""
        return min(self.blocks, max(2, int(density * self.blocks)))

    def read_bytes(self, density: float | None) -> int:
        """Bytes of the keys and values on the lists of one layer; None: of all."""
        tokens = self.length if density is None else min(self.length, self.listed(density) * BLOCK)
        return 2 * self.batch * tokens * self.heads.kv_heads * self.heads.head_dim * jnp.dtype(DTYPE).itemsize

    def layers(self, density: float | None) -> int:
        """How many layers' caches it takes so that no call finds in the L2 cache what it reads."""
        return layers_beyond_cache(self.read_bytes(density), self.read_bytes(None))

    @property
    def most_layers(self) -> int:
        """Layers of the caches, enough for every density."""
        return max(self.layers(density) for density in (*self.densities, None))

    @property
    def needed_bytes(self) -> int:
        """What the arrays take, with the copies for dense attention, which takes no rows of a larger cache."""
        copied = self.layers(None) if self.most_layers > 1 else 0
        return (self.most_layers + copied) * self.read_bytes(None)

    @functools.cached_property
    def lengths(self) -> Int[Array, "B"]:
        """S of each sequence."""
        return jnp.full(self.batch, self.length, jnp.int32)

    @functools.cached_property
    def arrays(self) -> tuple[Float[Array, "B H D"], Float[Array, "P S K D"], Float[Array, "P S K D"]]:
        """Queries of the newest tokens, keys and values of all layers."""
        heads, keys = self.heads, jax.random.split(jax.random.key(self.seed, impl="rbg"), 3)
        cache = self.most_layers * self.batch, self.length, heads.kv_heads, heads.head_dim
        shapes = (self.batch, heads.heads, heads.head_dim), cache, cache
        q, k, v = (large_random_array(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=True))
        return q, k, v

    def operands(self, density: float | None) -> list[tuple[Int[Array, "B"], BlockIndices | None]]:
        """Rows of the cache and lists of each layer, different ones in each."""
        batch, layers = self.batch, self.layers(density)
        rows = [jnp.arange(i * batch, (i + 1) * batch, dtype=jnp.int32) for i in range(layers)]
        if density is None:
            return [(x, None) for x in rows]
        lists = layers * batch, self.heads.kv_heads, self.blocks
        logits = jax.random.normal(jax.random.key(self.seed + 1), lists)
        keep = jnp.isin(jnp.arange(lists[-1]), jnp.asarray([0, lists[-1] - 1]))
        blocks = select_blocks(logits, block_size=BLOCK, max_blocks=self.listed(density), keep=keep)
        return [(x, jax.tree.map(lambda y, x=x: y[x], blocks)) for x in rows]

    @functools.cached_property
    def dense(self) -> Baseline:
        """JAX's fastest dense attention, each layer's in turn."""
        q, k, v = self.arrays
        pairs = [(k, v)]
        if self.most_layers > 1:
            take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=self.batch)
            pairs = [(take(k, i * self.batch), take(v, i * self.batch)) for i in range(self.layers(None))]
        attend = dense_attention(causal=False)

        def step(q: Array, shared: Any, _: None, number: int) -> Array:
            pairs, lengths = shared
            return attend(q[:, None], *pairs[number], lengths)[:, 0]

        seconds = read_seconds(self.read_bytes(None))
        return Baseline.of_dense(
            lambda: time_chain(step, q, (pairs, self.lengths), [None] * len(pairs), seconds=seconds)
        )


def _check_and_time(caches: Caches, density: float | None, implementation: Implementation | None) -> Outcome:
    (q, k, v), lengths = caches.arrays, caches.lengths
    operands = caches.operands(density)
    rows, blocks = operands[0]
    attend = functools.partial(sparse_decode_attention, lengths=lengths, implementation=implementation)
    checked = jax.jit(functools.partial(attend, return_lse=True))

    def result() -> AttentionWithScores:
        out, lse = checked(q, k, v, blocks, cache_rows=rows)
        return AttentionWithScores(out[:, None], lse[:, None], None, None)  # of T = 1 query each

    outcome = check_result(jax.random.key(caches.seed), as_prefill(q, k, v, blocks, lengths), result(), result())
    share = 1.0 if density is None else caches.listed(density) / caches.blocks
    results = {"density": share, **outcome.results}
    if outcome.failure is not None:
        return outcome._replace(results=results)
    read = caches.read_bytes(density)
    timing = time_chain(_step(implementation), q, (k, v, lengths), operands, seconds=read_seconds(read))
    results |= timing.results | floor_results(timing.milliseconds, read) | caches.dense.results(timing.milliseconds)
    return Outcome(results, caches.dense.note)


def _step(implementation: Implementation | None) -> Callable[[Array, Any, Any, int], Array]:
    attend = jax.jit(functools.partial(sparse_decode_attention, implementation=implementation))  # traced once for all

    def step(q: Array, shared: Any, operand: Any, _: int) -> Array:
        (k, v, lengths), (rows, blocks) = shared, operand
        return attend(q, k, v, blocks, lengths=lengths, cache_rows=rows)

    return step


def as_prefill(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    lengths: Int[Array, "B"],
) -> AttentionCall:
    """A call that reads the first B rows of the cache, as a prompt's with T = 1."""
    if blocks is None:
        blocks = BlockIndices.all_causal(1, k.shape[1], block_size=BLOCK, query_offset=lengths - 1, batch=len(q))
    else:
        blocks = BlockIndices(blocks.counts[..., None], blocks.indices[:, :, None], blocks.block_size)
    return AttentionCall(q[:, None], k, v, blocks, lengths - 1, lengths)

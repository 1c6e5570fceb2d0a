"""`sparse_decode_attention` measured: results are checked before they are timed, with dense attention beside them."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import AttentionWithScores, BlockIndices, select_blocks, sparse_decode_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.cases import large_random_array
from pallas_kernels.devices import device_of
from seer_jax.bench.configs import BLOCK, DecodeBench
from seer_jax.bench.harness.clock import floor_results, layers_beyond_cache, read_seconds, time_chain
from seer_jax.bench.harness.measurement import DenseTime, Measurement, Outcome, dense_results, measure, time_dense
from seer_jax.bench.harness.report import DENSE, ERRORS, FLOOR, LISTED, MEMORY, MILLISECONDS, SPEEDUP, Table
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result

COLUMNS = (LISTED, *ERRORS, MILLISECONDS, *FLOOR, DENSE, SPEEDUP, MEMORY)
DECODE_ATTENTION = Table("decode kernel", "Attention kernel, new tokens", COLUMNS)
DTYPE = jnp.bfloat16


def measure_decode_attention(config: DecodeBench) -> Iterator[Measurement]:
    """For each batch and length one measurement per density, and one of dense attention by the same operation."""
    heads, implementation = config.heads, config.implementation
    for batch, length in itertools.product(config.batches, config.lengths):
        caches = Caches(config, batch, length)
        for density in (*config.densities, None):
            case = f"{batch} x {length}, " + ("dense" if density is None else f"{density:g}")
            settings = dict(batch=batch, length=length, density=density, block_size=BLOCK, dtype=str(jnp.dtype(DTYPE)))
            settings |= dataclasses.asdict(heads)
            settings |= dict(layers=caches.layers(density), implementation=implementation)
            run = functools.partial(_check_and_time, caches, density, implementation)
            required, needed = implementation is not None, caches.needed_bytes
            yield measure(DECODE_ATTENTION.name, case, settings, run, required=required, needed_bytes=needed)


@dataclasses.dataclass(frozen=True)
class Caches:
    """Random caches of several layers for sequences of one length, whose newest tokens attend; drawn when they are needed.

    Attributes:
      config: heads, densities of the lists and seed.
      batch: B.
      length: S, keys of each sequence.
    """

    config: DecodeBench
    batch: int
    length: int

    @property
    def num_blocks(self) -> int:
        """Sb."""
        return -(-self.length // BLOCK)

    def listed(self, density: float) -> int:
        """Blocks on a list, the current and the first among them: as many as `TopK` keeps while decoding."""
        return min(self.num_blocks, max(2, int(density * self.num_blocks)))

    def read_bytes(self, density: float | None) -> int:
        """Bytes of the keys and values on the lists of one layer; None: of all."""
        tokens = self.length if density is None else min(self.length, self.listed(density) * BLOCK)
        heads = self.config.heads
        return 2 * self.batch * tokens * heads.kv_heads * heads.head_dim * jnp.dtype(DTYPE).itemsize

    def layers(self, density: float | None) -> int:
        """Layers that take turns, so that no call finds in the L2 cache what it reads."""
        return layers_beyond_cache(self.read_bytes(density), self.read_bytes(None))

    @property
    def most_layers(self) -> int:
        """Layers that there are, enough for every density."""
        return max(self.layers(density) for density in (*self.config.densities, None))

    @property
    def needed_bytes(self) -> int:
        """Bytes of all layers, and of the copies for dense attention of JAX, which takes no rows of a larger cache."""
        copied = self.layers(None) if self.most_layers > 1 else 0
        return (self.most_layers + copied) * self.read_bytes(None)

    @functools.cached_property
    def arrays(self) -> tuple[Float[Array, "B H D"], Float[Array, "P S K D"], Float[Array, "P S K D"], Int[Array, "B"]]:
        """Queries of the newest tokens, keys and values of all layers, lengths."""
        heads, keys = self.config.heads, jax.random.split(jax.random.key(self.config.seed, impl="rbg"), 3)
        cache = self.most_layers * self.batch, self.length, heads.kv_heads, heads.head_dim
        shapes = (self.batch, heads.heads, heads.head_dim), cache, cache
        q, k, v = (large_random_array(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=True))
        return q, k, v, jnp.full(self.batch, self.length, jnp.int32)

    def operands(self, density: float | None) -> list[tuple[Int[Array, "B"], BlockIndices | None]]:
        """Rows of the cache and lists of each layer, different ones in each."""
        batch, layers = self.batch, self.layers(density)
        rows = [jnp.arange(i * batch, (i + 1) * batch, dtype=jnp.int32) for i in range(layers)]
        if density is None:
            return [(x, None) for x in rows]
        lists = layers * batch, self.config.heads.kv_heads, self.num_blocks
        logits = jax.random.normal(jax.random.key(self.config.seed + 1), lists)
        keep = jnp.isin(jnp.arange(lists[-1]), jnp.asarray([0, lists[-1] - 1]))
        blocks = select_blocks(logits, block_size=BLOCK, max_blocks=self.listed(density), keep=keep)
        return [(x, jax.tree.map(lambda y, x=x: y[x], blocks)) for x in rows]

    @functools.cached_property
    def dense(self) -> DenseTime:
        """JAX's fastest dense attention, each layer's in turn."""
        q, k, v, lengths = self.arrays
        pairs = [(k, v)]
        if self.most_layers > 1:
            take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=self.batch)
            pairs = [(take(k, i * self.batch), take(v, i * self.batch)) for i in range(self.layers(None))]
        fastest = "cudnn" if device_of(q).platform == "gpu" else "xla"
        attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation=fastest))  # traced once for all

        def step(q: Array, shared: Any, _: None, number: int) -> Array:
            pairs, lengths = shared
            return attend(q[:, None], *pairs[number], key_value_seq_lengths=lengths)[:, 0]

        seconds = read_seconds(self.read_bytes(None))
        return time_dense(lambda: time_chain(step, q, (pairs, lengths), [None] * len(pairs), seconds=seconds))


def _check_and_time(caches: Caches, density: float | None, implementation: Implementation | None) -> Outcome:
    q, k, v, lengths = caches.arrays
    operands = caches.operands(density)
    call = functools.partial(sparse_decode_attention, implementation=implementation)
    attend, attend_with_lse = jax.jit(call), jax.jit(functools.partial(call, return_lse=True))
    rows, blocks = operands[0]

    def result() -> AttentionWithScores:
        out, lse = attend_with_lse(q, k, v, blocks, lengths=lengths, cache_rows=rows)
        return AttentionWithScores(out[:, None], lse[:, None], None, None)

    def step(q: Array, shared: Any, operand: Any, _: int) -> Array:
        (k, v, lengths), (rows, blocks) = shared, operand
        return attend(q, k, v, blocks, lengths=lengths, cache_rows=rows)

    outcome = check_result(
        jax.random.key(caches.config.seed), _as_prefill(q, k, v, blocks, lengths), result(), result()
    )
    share = 1.0 if density is None else caches.listed(density) / caches.num_blocks
    results = {"density": share, **outcome.results}
    if outcome.failure is not None:
        return outcome._replace(results=results)
    read = caches.read_bytes(density)
    timing = time_chain(step, q, (k, v, lengths), operands, seconds=read_seconds(read))
    dense, note = caches.dense
    results |= timing._asdict() | floor_results(timing.milliseconds, read)
    return Outcome({**results, **dense_results(dense, timing)}, note)


def _as_prefill(q: Array, k: Array, v: Array, blocks: BlockIndices | None, lengths: Array) -> AttentionCall:
    """A call that reads the first B rows of the cache, as that of a prompt with T = 1."""
    q, offset = q[:, None], lengths - 1
    if blocks is None:
        return AttentionCall.dense(q, k, v, offset, lengths)
    blocks = BlockIndices(blocks.counts[..., None], blocks.indices[:, :, None], blocks.block_size)
    return AttentionCall(q, k, v, blocks, offset, lengths)

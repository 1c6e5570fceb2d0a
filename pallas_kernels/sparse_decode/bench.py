"""`sparse_decode_attention` measured: results are held against float32 before they are timed, with cuDNN's dense attention beside them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import (
    Measurement,
    first_line,
    floor_results,
    guarded,
    layers_beyond_cache,
    memory_rate,
    time_chain,
    too_large,
)
from pallas_kernels.block_sparse_attention.sampled_check import find_fault, sampled_errors
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.cases import Heads, large_random_array
from pallas_kernels.gate_selection.api import select_blocks
from pallas_kernels.sparse_decode.api import sparse_decode_attention

BLOCK = 64
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sequences of one length whose newest tokens attend.

    Attributes:
      heads: H, K and D.
      batch: B.
      length: S, keys of each sequence.
    """

    heads: Heads
    batch: int
    length: int

    @property
    def blocks(self) -> int:
        """Sb."""
        return -(-self.length // BLOCK)

    @property
    def layer_bytes(self) -> int:
        """Of keys and values of one layer."""
        return self._read_bytes(self.length)

    def listed(self, density: float) -> int:
        """Blocks on a list, the current and the first among them: as many as `TopK` keeps while decoding."""
        return min(self.blocks, max(2, int(density * self.blocks)))

    def read_bytes(self, density: float | None) -> int:
        """Of the keys and values on the lists of one layer; None: of all."""
        return self._read_bytes(self.length if density is None else min(self.length, self.listed(density) * BLOCK))

    def layers(self, density: float | None) -> int:
        """So many layers' caches that no call finds in the L2 cache what it reads."""
        return layers_beyond_cache(self.read_bytes(density), self.layer_bytes)

    def _read_bytes(self, tokens: int) -> int:
        return 2 * self.batch * tokens * self.heads.kv_heads * self.heads.head_dim * jnp.dtype(DTYPE).itemsize


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures calls.

    Attributes:
      implementation: see `sparse_decode_attention`.
      seed: of the random inputs and lists.
    """

    implementation: Implementation | None = None
    seed: int = 0

    def sweep(
        self, heads: Heads, batches: Sequence[int], lengths: Sequence[int], densities: Sequence[float]
    ) -> Iterator[Measurement]:
        """For each batch and length one measurement per density, and one of dense attention by the same operation."""
        for batch, length in itertools.product(batches, lengths):
            inputs = _Inputs(Shape(heads, batch, length), densities, self.seed)
            for density in (*densities, None):
                yield self._guarded(inputs, density)

    def _guarded(self, inputs: "_Inputs", density: float | None) -> Measurement:
        shape = inputs.shape
        name = f"{shape.batch} x {shape.length}, " + ("dense" if density is None else f"{density:g}")
        settings = dict(
            batch=shape.batch, length=shape.length, density=density, block_size=BLOCK, dtype=str(jnp.dtype(DTYPE))
        )
        settings |= dataclasses.asdict(shape.heads) | dict(
            layers=shape.layers(density), implementation=self.implementation
        )
        blank = Measurement("decode kernel", name, settings)
        note = too_large(inputs.needed_bytes)
        if note is not None:
            return dataclasses.replace(blank, note=f"{shape.batch} x {shape.length} {note}")
        named = self.implementation is not None  # who is asked for by name must be able
        measure = functools.partial(self._measure, inputs, density, blank)
        return guarded(measure, blank, required=named, must_fit=False)

    def _measure(self, inputs: "_Inputs", density: float | None, blank: Measurement) -> Measurement:
        shape, (q, k, v) = inputs.shape, inputs.arrays
        operands = inputs.operands(density)
        rows, blocks = operands[0]
        call = functools.partial(sparse_decode_attention, lengths=inputs.lengths, implementation=self.implementation)
        checked = jax.jit(functools.partial(call, return_lse=True))
        first, second = (
            tuple(x[:, None] for x in checked(q, k, v, blocks, cache_rows=rows)) for _ in range(2)
        )  # of T = 1 query each
        arguments = as_prefill(q, k, v, blocks, inputs.lengths)
        errors = sampled_errors(jax.random.key(self.seed), arguments, *first)
        failure = find_fault(errors, arguments, first, second)
        read = shape.read_bytes(density)
        results: dict[str, float | None] = {
            "density": 1.0 if density is None else shape.listed(density) / shape.blocks,
            "error": errors.out,
            "plain_error": errors.plain,
            "lse_error": errors.lse,
        }
        if failure is not None:
            return dataclasses.replace(blank, results=results, failure=failure)
        timing = time_chain(
            _step(self.implementation), q, (k, v, inputs.lengths), operands, seconds=read / memory_rate()
        )
        dense, note = inputs.dense_milliseconds
        results |= {
            "milliseconds": timing.milliseconds,
            "spread": timing.spread,
            **floor_results(timing.milliseconds, read),
            "dense_milliseconds": dense,
            "speedup": None if dense is None else dense / timing.milliseconds,
        }
        return dataclasses.replace(blank, results=results, note=note)


class _Inputs:
    """Random arrays of one shape, drawn when they are needed: caches of several layers, and lists of blocks for each.

    Attributes:
      needed_bytes: what they take.
    """

    def __init__(self, shape: Shape, densities: Sequence[float], seed: int):
        self.shape, self.seed = shape, seed
        self.layers = max(shape.layers(density) for density in (*densities, None))
        copied = shape.layers(None) if self.layers > 1 else 0  # for cuDNN, which knows no rows of a larger cache
        self.needed_bytes = (self.layers + copied) * shape.layer_bytes
        self.lengths = jnp.full(shape.batch, shape.length, jnp.int32)

    @functools.cached_property
    def arrays(self) -> tuple[Float[Array, "B H D"], Float[Array, "P S K D"], Float[Array, "P S K D"]]:
        """Queries of the newest tokens, keys and values of all layers."""
        heads, keys = self.shape.heads, jax.random.split(jax.random.key(self.seed, impl="rbg"), 3)
        cache = self.layers * self.shape.batch, self.shape.length, heads.kv_heads, heads.head_dim
        shapes = (self.shape.batch, heads.heads, heads.head_dim), cache, cache
        q, k, v = (large_random_array(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=True))
        return q, k, v

    def operands(self, density: float | None) -> list[tuple[Int[Array, "B"], BlockIndices | None]]:
        """Rows of the cache and lists of each layer, which no other one has."""
        batch, layers = self.shape.batch, self.shape.layers(density)
        rows = [jnp.arange(i * batch, (i + 1) * batch, dtype=jnp.int32) for i in range(layers)]
        if density is None:
            return [(x, None) for x in rows]
        lists = layers * batch, self.shape.heads.kv_heads, self.shape.blocks
        logits = jax.random.normal(jax.random.key(self.seed + 1), lists)
        keep = jnp.isin(jnp.arange(lists[-1]), jnp.asarray([0, lists[-1] - 1]))
        blocks = select_blocks(logits, block_size=BLOCK, max_blocks=self.shape.listed(density), keep=keep)
        return [(x, jax.tree.map(lambda y, x=x: y[x], blocks)) for x in rows]

    @functools.cached_property
    def dense_milliseconds(self) -> tuple[float | None, str | None]:
        """Time of JAX's fastest dense attention on this device, or why there is none."""
        q, k, v = self.arrays
        batch, layers = self.shape.batch, self.shape.layers(None)
        pairs = [(k, v)]
        if self.layers > 1:
            take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=batch)
            pairs = [(take(k, i * batch), take(v, i * batch)) for i in range(layers)]

        def step(q: Array, shared: Any, _: None, number: int) -> Array:
            return dense_attention(q, *shared[0][number], shared[1])

        seconds = self.shape.layer_bytes / memory_rate()
        try:
            timing = time_chain(step, q, (pairs, self.lengths), [None] * len(pairs), seconds=seconds)
        except (ValueError, RuntimeError) as error:  # NotImplementedError among them, and errors of the device
            return None, f"dense attention: {first_line(error)}"
        return timing.milliseconds, None


def _step(implementation: Implementation | None) -> Callable[[Array, Any, Any, int], Array]:
    attend = jax.jit(functools.partial(sparse_decode_attention, implementation=implementation))  # traced once for all

    def step(q: Array, shared: Any, operand: Any, _: int) -> Array:
        (k, v, lengths), (rows, blocks) = shared, operand
        return attend(q, k, v, blocks, lengths=lengths, cache_rows=rows)

    return step


@jax.jit
def dense_attention(
    q: Float[Array, "B H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], lengths: Int[Array, "B"]
) -> Float[Array, "B H D"]:
    """cuDNN's on a GPU, XLA's elsewhere."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths, implementation=implementation)[
        :, 0
    ]


def as_prefill(
    q: Float[Array, "B H D"],
    k: Float[Array, "P S K D"],
    v: Float[Array, "P S K D"],
    blocks: BlockIndices | None,
    lengths: Int[Array, "B"],
) -> dict[str, Any]:
    """The arguments of a call that reads the first B rows of the cache, as those of `block_sparse_attention` with T = 1."""
    if blocks is None:
        counts = jnp.broadcast_to(-(-lengths // BLOCK)[:, None], (len(lengths), k.shape[2]))
        every = jnp.arange(-(-k.shape[1] // BLOCK), dtype=jnp.int32)
        blocks = BlockIndices(counts, jnp.broadcast_to(every, (*counts.shape, len(every))), BLOCK)
    blocks = BlockIndices(blocks.counts[..., None], blocks.indices[:, :, None], blocks.block_size)
    return dict(q=q[:, None], k=k, v=v, blocks=blocks, lengths=lengths, query_offset=lengths - 1)

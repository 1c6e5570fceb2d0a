"""`block_sparse_attention` for Hopper GPUs, in Pallas Mosaic GPU. README.md beside this explains the two kernels.

Inside the kernels a tile is what one matrix product takes: 64 queries of one head against 64 or 128 keys. Scores are kept in
base 2, scaled by c = scale * log2(e), since the hardware has exp2 alone.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.backends import Unsupported
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.hopper import interpreter, require_hopper

QUERIES = 64  # of a tile: the rows of one warpgroup's matrix product
TOKENS = 8  # the copy engine takes tokens in groups of so many
LOG2_E = math.log2(math.e)

_i32 = jnp.int32
_MATRIX = plgpu.Layout.WGMMA
_ROWS = _MATRIX.reduce(1)
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
_accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


class Sharing(enum.Enum):
    """Whose lists the two consumer warpgroups of the ring kernel walk."""

    NONE = "each its own, of two adjacent query blocks"
    HEADS = "one list, shared by two query heads of a group"
    QUERIES = "one list of 128-token blocks, shared by the halves of a query block"


@dataclasses.dataclass(frozen=True)
class Solo:
    """One warpgroup per CTA walks one list and loads for itself; four CTAs per multiprocessor hide each other's waits."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Two warpgroups compute on tiles of 128 keys while a third one loads them into rings.

    Attributes:
      sharing: of lists, and so of rings.
      k_slots, v_slots: tiles in each ring.
      queries_in_registers: keep the query tile there; leaves shared-memory bandwidth to the keys.
    """

    sharing: Sharing
    k_slots: int = 2
    v_slots: int = 2
    queries_in_registers: bool = True

    @property
    def rings(self) -> int:
        return 2 if self.sharing is Sharing.NONE else 1

    @property
    def entries(self) -> int:
        """List entries that make a tile of 128 keys."""
        return 1 if self.sharing is Sharing.QUERIES else 2


Config = Solo | Ring

# Measured on H200 and H100; the table is in README.md.
CONFIGS: dict[str, Config] = {
    "solo": Solo(),
    "own": Ring(Sharing.NONE, v_slots=1),
    "heads": Ring(Sharing.HEADS),
    "queries": Ring(Sharing.QUERIES),
}
DENSE = 0.5  # from this density on, wider tiles pay more than more CTAs


def choose_config(heads: int, kv_heads: int, lists: int, block_size: int, density: float | None) -> Config:
    """The fastest kernel for lists of this kind. `density` is what the caller expects, None if nothing."""
    if block_size == 128:
        return CONFIGS["queries"]
    if lists <= kv_heads and heads // kv_heads % 2 == 0:
        return CONFIGS["heads"]
    return CONFIGS["own"] if density is not None and density >= DENSE else CONFIGS["solo"]


def block_sparse_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    *,
    scale: float,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
    density: float | None,
    config: Config | None = None,
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    """See the function of this name in api.py. Gradients are those of xla.py.

    Args:
      config: which kernel; None for what `choose_config` says.
    """
    require_hopper()
    (_, _, heads, head_dim), kv_heads, lists = q.shape, k.shape[2], blocks.counts.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16; got {q.dtype}.")
    if head_dim not in (64, 128):
        raise Unsupported(f"takes head dims 64 and 128; got {head_dim}.")
    if blocks.block_size not in (64, 128):
        raise Unsupported(f"takes blocks of 64 and 128 tokens; got {blocks.block_size}.")
    config = config or choose_config(heads, kv_heads, lists, blocks.block_size, density)
    _check_config(config, heads // kv_heads, lists <= kv_heads, blocks.block_size)
    call = functools.partial(_differentiable, config, scale, interpreter())
    return call(q, k, v, blocks, query_offset, lengths)


def _check_config(config: Config, group: int, shared_lists: bool, block_size: int) -> None:
    sharing = config.sharing if isinstance(config, Ring) else Sharing.NONE
    if (sharing is Sharing.QUERIES) != (block_size == 128):
        raise Unsupported(f"Sharing.QUERIES is for blocks of 128 tokens, and nothing else is; got {config}.")
    if sharing is Sharing.HEADS and not (shared_lists and group % 2 == 0):
        raise Unsupported(f"Sharing.HEADS needs lists shared by an even number of query heads; got groups of {group}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(config, scale, interpret, q, k, v, blocks, query_offset, lengths):
    return _forward(config, scale, interpret, q, k, v, blocks, query_offset, lengths)


def _forward_rule(config, scale, interpret, q, k, v, blocks, query_offset, lengths):
    out, lse = _forward(config, scale, interpret, q, k, v, blocks, query_offset, lengths)
    return (out, lse), (q, k, v, blocks, query_offset, lengths, out, lse)


def _backward_rule(config, scale, interpret, residuals, cotangents):
    q, k, v, blocks, query_offset, lengths, out, lse = residuals
    gradients = xla.block_sparse_attention_gradients(
        q, k, v, blocks, out, lse, *cotangents, scale=scale, query_offset=query_offset, lengths=lengths
    )
    return *gradients, None, None, None


_differentiable.defvjp(_forward_rule, _backward_rule)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    config: Config,
    scale: float,
    interpret: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    blocks: BlockIndices,
    query_offset: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T H D"], Float32[Array, "B T H"]]:
    if scale <= 0:  # the kernels take the maximum of the scores before they scale them
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    num_queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0))) for x in (q, k, v))
    batch, padded, heads, head_dim = q.shape
    _, lists, rows = blocks.counts.shape
    shape = _Shape(batch, padded, heads, head_dim, k.shape[2], lists, rows, blocks.block_size)
    c = scale * LOG2_E
    if isinstance(config, Solo):
        kernel = _solo_kernel(shape, c, interpret, q.dtype)
    else:
        kernel = _ring_kernel(shape, config, c, interpret, q.dtype)
    out, lse = kernel(q, k, v, blocks.counts, blocks.indices, jnp.stack([query_offset, lengths], axis=1))
    return out[:, :num_queries], lse[:, :, :num_queries].transpose(0, 2, 1)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes that a kernel is compiled for: B, T, H, D, K, Hs, Tb and b."""

    batch: int
    num_queries: int
    heads: int
    head_dim: int
    kv_heads: int
    lists: int
    rows: int
    block_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def outputs(self, dtype: Any, lse_queries: int) -> list[jax.ShapeDtypeStruct]:
        """Of both kernels: out [B, T, H, D] and lse [B, H, lse_queries].

        Queries beyond the last are not written to `out`, but they would be to `lse`: there the copy engine knows no bounds.
        """
        queries = self.batch, self.num_queries, self.heads, self.head_dim
        lse = self.batch, self.heads, lse_queries
        return [jax.ShapeDtypeStruct(queries, dtype), jax.ShapeDtypeStruct(lse, jnp.float32)]

    def place(self, cta: Array, per_head: int, per_group: int) -> tuple[Array, Array, Array, Array]:
        """(sequence, key/value head, place in its group, place among the head's query blocks) of a CTA.

        All work of a key/value head is contiguous in time, so that its keys and values stay in L2; the last query blocks, whose
        lists are longest, start first.
        """
        rest, in_group = lax.div(cta, _i32(per_group)), lax.rem(cta, _i32(per_group))
        rest, in_head = lax.div(rest, _i32(per_head)), lax.rem(rest, _i32(per_head))
        return lax.div(rest, _i32(self.kv_heads)), lax.rem(rest, _i32(self.kv_heads)), in_group, per_head - 1 - in_head


@dataclasses.dataclass(frozen=True)
class _Queries:
    """64 queries of one head: what one warpgroup works on.

    Attributes:
      sequence, head, kv_head: which.
      start: first query.
      list_row: which of the head's lists they read; may lie beyond the last one.
    """

    sequence: Array
    head: Array
    kv_head: Array
    start: Array
    list_row: Array

    def of(self, ref: Any) -> Any:
        """Their part of q or of the output."""
        return ref.at[self.sequence, pl.ds(self.start, QUERIES), self.head]


@dataclasses.dataclass(frozen=True)
class _Row:
    """The list of key blocks that some queries read, and what they may see.

    Attributes:
      entry: `entry(i)` is block number i on the list, for i below `width`.
      width: N.
      count: blocks on the list; 0 if the sequence ends before the queries, or the list does not exist.
      position: of the first query, in tokens from the first key.
      length: keys of the sequence.
    """

    entry: Callable[[Array | int], Array]
    width: int
    count: Array
    position: Array
    length: Array

    @classmethod
    def read(cls, shape: _Shape, refs: "_Inputs", queries: _Queries) -> "_Row":
        sequence, list_head = queries.sequence, lax.div(queries.head * shape.lists, _i32(shape.heads))
        list_row = jnp.minimum(queries.list_row, shape.rows - 1)
        count = refs.counts[sequence, list_head, list_row]
        offset, length = refs.offsets[sequence, 0], refs.offsets[sequence, 1]
        exists = (queries.list_row < shape.rows) & (offset + list_row * shape.block_size < length)

        def entry(i: Array | int) -> Array:
            return refs.indices[sequence, list_head, list_row, i]

        width = refs.indices.shape[-1]
        return cls(entry, width, jnp.where(exists, count, 0), offset + queries.start, length)

    def sees_all(self, block: Array, block_size: int) -> Array:
        """Whether every query sees all of a key block; the first query sees the fewest keys."""
        return (block + 1) * block_size <= self.position + 1

    def mask(self, scores: Array, start: Array) -> Array:
        """-inf for the keys that a query must not see; the first column is the key at position `start`."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=_ROWS)
        visible = jnp.minimum(query + 1, self.length) - start
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_MATRIX)
        # column < visible, as a comparison of constants with one number per row: bits 1 and 2 of a column are the thread's, the
        # others the register's. Columns kept in registers would cost a quarter of the CTAs.
        thread = column & 6
        return jnp.where((column - thread) < _columns(visible, scores) - thread, scores, -jnp.inf)

    def finish(self, state: "_Softmax") -> tuple[Array, Array]:
        """Output and lse; 0 and -inf for queries that see no key or lie beyond the sequence."""
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=_ROWS)
        seen = (query < self.length) & (state.total > 0)
        inverse = 1 / jnp.where(seen, state.total, 1)
        out = jnp.where(_columns(seen, state.out), state.out * _columns(inverse, state.out), 0)
        lse = (state.maximum + jnp.log2(jnp.where(seen, state.total, 1))) / LOG2_E
        return out, jnp.where(seen, lse, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """References to the kernel's inputs in global memory; `offsets` [B, 2] holds query_offset and length."""

    q: Any
    k: Any
    v: Any
    counts: Any
    indices: Any
    offsets: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Softmax:
    """Sums over the keys so far, in registers: out [64, D], maximum and total [64], float32."""

    out: Array
    maximum: Array
    total: Array

    @classmethod
    def empty(cls, head_dim: int) -> "_Softmax":
        out = plgpu.layout_cast(jnp.full((QUERIES, head_dim), 0, jnp.float32), _MATRIX)
        lowest = jnp.finfo(jnp.float32).min  # not -inf: where all scores are, their difference is NaN
        maximum = plgpu.layout_cast(jnp.full((QUERIES,), lowest, jnp.float32), _ROWS)
        return cls(out, maximum, plgpu.layout_cast(jnp.full((QUERIES,), 0, jnp.float32), _ROWS))

    def add(self, scores: Array, c: float) -> tuple[Array, Array, Array, Array]:
        """Takes scores in: (maximum, total, weights, factor on `out`)."""
        maximum = jnp.maximum(self.maximum, scores.max(axis=1) * c)
        weights = jnp.exp2(scores * c - _columns(maximum, scores))
        factor = jnp.exp2(self.maximum - maximum)
        return maximum, self.total * factor + weights.sum(axis=1), weights, factor


def _columns(row_values: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(row_values, like.shape, [0])


def _product(q: Any, k_tile: Any) -> Array:
    """q k^T; q in shared memory or registers."""

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q, k_tile.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, _accumulator((QUERIES, k_tile.shape[0]), jnp.float32))


def _accumulate(out: Array, weights: Array, v_tile: Any, interpret: Any) -> Array:
    """out + weights v; weights in registers."""
    if interpret:  # the interpreter has no accumulators with a start value
        v = v_tile[...]
        plgpu.commit_smem()  # a plain read must be over before the copy engine writes there again
        return out + jnp.dot(weights.astype(jnp.float32), v.astype(jnp.float32))
    multiply: Any = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v_tile))
    return multiply(_accumulator.init(out))


def _write(
    queries: _Queries, row: _Row, state: _Softmax, q_tile: Any, lse_row: Any, out_ref: Any, lse_ref: Any
) -> None:
    """Sends the results off through shared memory; the query tile is not needed any more."""
    out, lse = row.finish(state)
    q_tile[...] = out.astype(q_tile.dtype)
    lse_row[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, queries.of(out_ref))
    plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[queries.sequence, queries.head, pl.ds(queries.start, QUERIES)])
    plgpu.wait_smem_to_gmem(0)


def _tile(*shape_and_dtype: Any) -> Any:
    *shape, dtype = shape_and_dtype
    return plgpu.SMEM(tuple(shape), dtype, transforms=_TILED)


def _solo_kernel(shape: _Shape, c: float, interpret: Any, dtype: Any) -> Callable:
    b = shape.block_size

    def kernel(
        q_ref, k_ref, v_ref, counts, indices, offsets, out_ref, lse_ref, q_tile, k_tile, v_tile, lse_row, *ready
    ):
        refs, (q_ready, k_ready, v_ready) = _Inputs(q_ref, k_ref, v_ref, counts, indices, offsets), ready
        sequence, kv_head, in_group, block = shape.place(lax.axis_index("cta"), shape.rows, shape.group)
        queries = _Queries(sequence, kv_head * shape.group + in_group, kv_head, block * QUERIES, block)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, q_ready)
        row = _Row.read(shape, refs, queries)
        first = row.entry(0)

        def load(source: Any, tile: Any, barrier: Any, t: Array, key_block: Array) -> None:
            @pl.when(t < row.count)
            def _():
                plgpu.copy_gmem_to_smem(source.at[sequence, pl.ds(key_block * b, b), kv_head], tile, barrier)

        load_k = functools.partial(load, refs.k, k_tile, k_ready)
        load_v = functools.partial(load, refs.v, v_tile, v_ready)
        load_k(_i32(0), first)
        load_v(_i32(0), first)
        plgpu.barrier_wait(q_ready)

        def step(carry: tuple[Array, Array, _Softmax], *, masked: bool) -> tuple[Array, Array, _Softmax]:
            """Takes key block `key_block`, number t on the list, in."""
            t, key_block, state = carry
            following = row.entry(jnp.minimum(t + 1, row.width - 1))  # read early: it takes a trip to L2
            plgpu.barrier_wait(k_ready)
            scores = _product(q_tile, k_tile)
            load_k(t + 1, following)
            if masked:
                scores = row.mask(scores, key_block * b)
            maximum, total, weights, factor = state.add(scores, c)
            out, weights = state.out * _columns(factor, state.out), weights.astype(dtype)
            if not interpret:  # nothing of this may move behind the wait
                out, total, maximum, weights = lax.optimization_barrier((out, total, maximum, weights))
            plgpu.barrier_wait(v_ready)
            out = _accumulate(out, weights, v_tile, interpret)
            load_v(t + 1, following)
            return t + 1, following, _Softmax(out, maximum, total)

        def unmasked(carry: tuple[Array, Array, _Softmax]) -> Array:
            return (carry[0] < row.count) & row.sees_all(carry[1], b)

        carry = _i32(0), first, _Softmax.empty(shape.head_dim)
        carry = lax.while_loop(unmasked, functools.partial(step, masked=False), carry)
        carry = lax.while_loop(lambda carry: carry[0] < row.count, functools.partial(step, masked=True), carry)
        _write(queries, row, carry[2], q_tile, lse_row, out_ref, lse_ref)

    return plgpu.kernel(
        kernel,
        out_type=shape.outputs(dtype, shape.rows * QUERIES),
        scratch_types=[
            *(_tile(rows, shape.head_dim, dtype) for rows in (QUERIES, b, b)),
            plgpu.SMEM((QUERIES,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        grid=(shape.batch * shape.heads * shape.rows,),
        grid_names=("cta",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )


def _ring_kernel(shape: _Shape, config: Ring, c: float, interpret: Any, dtype: Any) -> Callable:
    b, entries, rings = shape.block_size, config.entries, config.rings
    consumers = 2
    width = entries * b  # keys of a tile
    match config.sharing:
        case Sharing.NONE:
            per_head, per_group, per_cta = -(-shape.rows // consumers), shape.group, consumers * QUERIES
        case Sharing.HEADS:
            per_head, per_group, per_cta = shape.rows, shape.group // consumers, QUERIES
        case Sharing.QUERIES:
            per_head, per_group, per_cta = shape.rows, shape.group, consumers * QUERIES

    def queries_of(consumer: Array) -> _Queries:
        sequence, kv_head, in_group, place = shape.place(lax.axis_index("cta"), per_head, per_group)
        list_row, start = place, place * b
        match config.sharing:
            case Sharing.NONE:
                list_row = place * consumers + consumer
                start = list_row * QUERIES
            case Sharing.HEADS:
                in_group = in_group * consumers + consumer
            case Sharing.QUERIES:
                start += consumer * QUERIES
        return _Queries(sequence, kv_head * shape.group + in_group, kv_head, start, list_row)

    def num_tiles(row: _Row) -> Array:
        """A row without blocks takes one tile, all of it masked: so the loops have a first tile in any case."""
        return jnp.maximum(lax.div(row.count + (entries - 1), _i32(entries)), 1)

    def tile_entries(row: _Row, t: Array) -> list[Array]:
        """Block numbers of a tile. In the place of an entry that is missing, the one before it is read again, or block 0."""
        blocks = [jnp.where(row.count > 0, row.entry(t * entries), 0)]
        for i in range(1, entries):  # no address waits for the count
            at = t * entries + i
            blocks.append(jnp.where(at < row.count, row.entry(jnp.minimum(at, row.width - 1)), blocks[0]))
        return blocks

    def last_entries(row: _Row) -> tuple[Array, Array, Array]:
        """The list's length and its last two entries."""
        last, before = (row.entry(jnp.maximum(row.count - i, 0)) for i in (1, 2))
        return row.count, last, before

    def fully_visible(row: _Row, last_entries: tuple[Array, Array, Array]) -> Array:
        """How many entries, from the first on, every query sees in full. Lists ascend, so the rest is at the end."""

        def hidden(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[0] > 0) & ~row.sees_all(carry[1], b)

        def shorten(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return carry[0] - 1, carry[2], row.entry(jnp.maximum(carry[0] - 3, 0))

        return lax.while_loop(hidden, shorten, last_entries)[0]

    def consume(consumer: Array, refs: _Inputs, out_ref: Any, lse_ref: Any, scratch: "_RingScratch") -> None:
        q_tile, q_ready = scratch.q_tiles.at[consumer], scratch.q_ready.at[consumer]
        queries = queries_of(consumer)
        plgpu.copy_gmem_to_smem(queries.of(refs.q), q_tile, q_ready)
        row = _Row.read(shape, refs, queries)
        tiles = num_tiles(row)
        last = last_entries(row)  # read early: it takes a trip to L2
        plgpu.barrier_wait(q_ready)
        q = q_tile[...] if config.queries_in_registers and not interpret else q_tile
        ring = consumer if rings == consumers else _i32(0)

        def slot(t: Array, slots: int) -> Array:
            return ring * slots + lax.rem(t, _i32(slots))

        def mask(scores: Array, t: Array) -> Array:
            parts = []
            for i, block in enumerate(tile_entries(row, t)):
                missing = t * entries + i >= row.count
                start = jnp.where(missing, row.length, block * b)  # beyond the end no key is visible
                parts.append(row.mask(scores[:, i * b : (i + 1) * b], start))
            return parts[0] if entries == 1 else jnp.concatenate(parts, axis=1)

        def weigh(scores: Array, state: _Softmax, t: Array, masked: bool) -> tuple[Array, Array, Array, Array]:
            scores = mask(scores, t) if masked else scores
            maximum, total, weights, factor = state.add(scores, c)
            return maximum, total, weights.astype(dtype), factor

        def first() -> tuple[_Softmax, Array]:
            t = _i32(0)
            k_slot = slot(t, config.k_slots)
            plgpu.barrier_wait(scratch.k_ready.at[k_slot])
            scores = _product(q, scratch.k_tiles.at[k_slot])
            plgpu.barrier_arrive(scratch.k_free.at[k_slot])
            state = _Softmax.empty(shape.head_dim)
            maximum, total, weights, _ = weigh(scores, state, t, masked=True)
            return _Softmax(state.out, maximum, total), weights

        def step(t: Array, carry: tuple[_Softmax, Array], *, masked: bool) -> tuple[_Softmax, Array]:
            """Scores of tile t, while the values of tile t - 1 are added under its softmax."""
            state, weights = carry
            k_slot, v_slot = slot(t, config.k_slots), slot(t - 1, config.v_slots)
            k_tile, v_tile = scratch.k_tiles.at[k_slot], scratch.v_tiles.at[v_slot]
            plgpu.barrier_wait(scratch.k_ready.at[k_slot])
            plgpu.barrier_wait(scratch.v_ready.at[v_slot])
            if interpret:
                scores = _product(q, k_tile)
                plgpu.barrier_arrive(scratch.k_free.at[k_slot])
                maximum, total, new_weights, factor = weigh(scores, state, t, masked)
                out = _accumulate(state.out, weights, v_tile, interpret)
                plgpu.barrier_arrive(scratch.v_free.at[v_slot])
                return _Softmax(out * _columns(factor, out), maximum, total), new_weights

            def overlapped(scores_ref: Any, out_ref: Any) -> tuple[_Softmax, Array]:
                out_ref[...] = state.out
                plgpu.wgmma(scores_ref, q, k_tile.transpose((1, 0)))
                plgpu.wgmma(out_ref, weights, v_tile)
                scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                plgpu.barrier_arrive(scratch.k_free.at[k_slot])
                taken = lax.optimization_barrier(weigh(scores, state, t, masked))
                maximum, total, new_weights, factor = taken
                out = out_ref[...]
                # The old weights must outlive the wait: else the new ones get their registers while the product still
                # reads them, and ptxas makes the products wait for each other.
                _, new_weights = lax.optimization_barrier((weights, new_weights))
                plgpu.barrier_arrive(scratch.v_free.at[v_slot])
                return _Softmax(out * _columns(factor, out), maximum, total), new_weights

            accumulators = [_accumulator((QUERIES, n), jnp.float32) for n in (width, shape.head_dim)]
            return pl.run_scoped(overlapped, *accumulators)

        carry = first()
        full = lax.div(fully_visible(row, last), _i32(entries))
        carry = lax.fori_loop(_i32(1), full, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(jnp.maximum(full, 1), tiles, functools.partial(step, masked=True), carry)
        state, weights = carry
        v_slot = slot(tiles - 1, config.v_slots)
        plgpu.barrier_wait(scratch.v_ready.at[v_slot])
        out = _accumulate(state.out, weights, scratch.v_tiles.at[v_slot], interpret)
        plgpu.barrier_arrive(scratch.v_free.at[v_slot])
        state = dataclasses.replace(state, out=out)
        _write(queries, row, state, q_tile, scratch.lse_rows.at[consumer], out_ref, lse_ref)

    def produce(ring: int, refs: _Inputs, scratch: "_RingScratch") -> None:
        queries = queries_of(_i32(ring))
        row = _Row.read(shape, refs, queries)
        tiles = num_tiles(row)

        @pl.loop(_i32(0), tiles)
        def _(t: Array) -> None:
            blocks = tile_entries(row, t)  # before the waits: it takes a trip to L2

            def fill(source: Any, target: Any, ready: Any, free: Any, slots: int) -> None:
                at = ring * slots + lax.rem(t, _i32(slots))
                pl.when(t >= slots)(lambda: plgpu.barrier_wait(free.at[at]))
                for i, block in enumerate(blocks):
                    part = target.at[at] if entries == 1 else target.at[at, pl.ds(i * b, b)]
                    keys = source.at[queries.sequence, pl.ds(block * b, b), queries.kv_head]
                    plgpu.copy_gmem_to_smem(keys, part, ready.at[at])

            fill(refs.k, scratch.k_tiles, scratch.k_ready, scratch.k_free, config.k_slots)
            fill(refs.v, scratch.v_tiles, scratch.v_ready, scratch.v_free, config.v_slots)

        if interpret:  # which insists that a completed phase is seen by someone
            for free, slots in ((scratch.k_free, config.k_slots), (scratch.v_free, config.v_slots)):

                @pl.loop(jnp.maximum(tiles - slots, 0), tiles)
                def _(t: Array, free: Any = free, slots: int = slots) -> None:
                    plgpu.barrier_wait(free.at[ring * slots + lax.rem(t, _i32(slots))])

    def kernel(q_ref, k_ref, v_ref, counts, indices, offsets, out_ref, lse_ref, *scratch_refs):
        refs = _Inputs(q_ref, k_ref, v_ref, counts, indices, offsets)
        scratch = _RingScratch(*scratch_refs)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            plgpu.set_max_registers(240, action="increase")
            consume(warpgroup, refs, out_ref, lse_ref, scratch)

        @pl.when(warpgroup == consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            if rings == 1:
                produce(0, refs, scratch)
            else:  # one warp per ring: in a single loop the rings would wait for each other

                @plgpu.warp_map
                def _(warp: Array) -> None:
                    for ring in range(rings):
                        pl.when(warp == ring)(functools.partial(produce, ring, refs, scratch))

    readers = consumers // rings
    slots = rings * config.k_slots, rings * config.v_slots
    return plgpu.kernel(
        kernel,
        out_type=shape.outputs(dtype, per_head * per_cta),
        scratch_types=[
            _tile(consumers, QUERIES, shape.head_dim, dtype),
            *(_tile(number, width, shape.head_dim, dtype) for number in slots),
            plgpu.SMEM((consumers, QUERIES), jnp.float32),
            plgpu.Barrier(num_barriers=consumers),
            *(plgpu.Barrier(num_arrivals=entries, num_barriers=number) for number in slots),
            *(plgpu.Barrier(num_arrivals=readers, num_barriers=number) for number in slots),
        ],
        grid=(shape.batch * shape.kv_heads * per_head * per_group,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )


@dataclasses.dataclass(frozen=True)
class _RingScratch:
    """Shared memory of the ring kernel.

    Attributes:
      q_tiles: [2, 64, D], one per consumer; outputs leave through it.
      k_tiles, v_tiles: [rings * slots, 128, D].
      lse_rows: [2, 64].
      q_ready, k_ready, v_ready: barriers of the copies into a tile.
      k_free, v_free: barriers of the consumers that have read a tile.
    """

    q_tiles: Any
    k_tiles: Any
    v_tiles: Any
    lse_rows: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any

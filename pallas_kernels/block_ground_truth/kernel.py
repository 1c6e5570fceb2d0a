"""The kernel of `attention_with_block_scores`: see README.md beside this."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_ground_truth.workspace_slots import give_back_slot, num_slots, take_slot
from pallas_kernels.mosaic.edge_tiles import load_inside, load_transposed, store_inside
from pallas_kernels.mosaic.flash_tiles import MATRIX, QUERIES, ROW_VECTOR, Rings, Softmax, columns, i32, mask, tile

CONSUMERS = 2  # warpgroups that compute
KEYS = 128  # keys of a tile
STAGES = 2  # tiles in a ring buffer, a power of two
BLOCKS = 64  # key blocks of which scores are finished at a time
ROW_BLOCKS = 4096  # key blocks of a row of scores that two consumers can keep in shared memory beside the tiles
COLUMN_VECTOR = MATRIX.reduce(0)  # one element per column


@dataclasses.dataclass(frozen=True)
class Call:
    """Parameters that a kernel is compiled for.

    Attributes:
      batch, heads, kv_heads, head_dim: B, H, K, D.
      rows, padded_rows: T, and T padded for TMA.
      key_blocks: Sb.
      block_size: b, 64 or 128.
      block_scores, token_scores: which scores are computed.
      statistic: of what: "max", the largest weight of a block, or "mass", the sum of its weights.
      c: factor above 0 that turns products of queries and keys into scores in base 2.
      interpreted: whether JAX's interpreter runs the kernel.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    padded_rows: int
    key_blocks: int
    block_size: int
    block_scores: bool
    token_scores: bool
    statistic: str
    c: float
    interpreted: bool

    @property
    def scored(self) -> bool:
        return self.block_scores or self.token_scores

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def heads_per_cta(self) -> int:
        """Token scores are joined over the heads of a group, which a CTA computes one after the other."""
        return self.group if self.token_scores else 1

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // (CONSUMERS * QUERIES))

    @property
    def ctas(self) -> int:
        return self.batch * self.heads // self.heads_per_cta * self.row_tiles

    @property
    def by_mass(self) -> bool:
        return self.statistic == "mass"

    @property
    def slot_scale(self) -> float:
        """Factor that turns what a slot holds into scores in base 2: it holds products, or logarithms of sums in base 2."""
        return 1.0 if self.by_mass else self.c

    @property
    def slots(self) -> int:
        """Number of workspace slots."""
        return num_slots(self.ctas, CONSUMERS, interpreted=self.interpreted)

    @property
    def per_tile(self) -> int:
        """Key blocks in a tile."""
        return KEYS // self.block_size

    @property
    def divided_later(self) -> bool:
        """Whether rows of block scores are too long for the shared memory: they are stored without division by their sums."""
        return self.block_scores and self.key_blocks > ROW_BLOCKS

    @property
    def block_tiles(self) -> int:
        """Tiles of key blocks in a row of scores."""
        return -(-self.key_blocks // BLOCKS)

    def outputs(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Output [B, T, H, D], lse [B, T, H] and, if computed, workspace, block scores [B, H, T / 64, Sb] and token scores [B, K, T, Sb].

        In the interpreter these are padded to whole tiles, since it does not run the stores that stop at the edge.
        """
        rows, blocks = self.rows, self.key_blocks
        if self.interpreted:
            rows, blocks = self.row_tiles * CONSUMERS * QUERIES, self.block_tiles * BLOCKS
        shapes: list[tuple[int, ...]] = [(self.batch, rows, self.heads)]
        if self.scored:
            # The last tile of 128 keys may reach one block of 64 beyond the last one.
            shapes.append((self.slots, self.block_tiles * BLOCKS + 1, QUERIES))
        if self.block_scores:
            shapes.append((self.batch, self.heads, -(-rows // QUERIES), blocks))
        if self.token_scores:
            shapes.append((self.batch, self.kv_heads, rows, blocks))
        output = jax.ShapeDtypeStruct((self.batch, self.padded_rows, self.heads, self.head_dim), dtype)
        return [output, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)]

    def scratch(self, dtype: Any) -> list[Any]:
        """Shared memory, in the order of `_Scratch` and `Rings`."""
        row = self.block_tiles * BLOCKS if self.block_scores and not self.divided_later else 1
        return [
            tile(CONSUMERS, QUERIES, self.head_dim, dtype),
            plgpu.SMEM((CONSUMERS, 3, QUERIES), jnp.float32),
            plgpu.SMEM((CONSUMERS, row), jnp.float32),
            plgpu.SMEM((CONSUMERS, 1), jnp.int32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            *(tile(STAGES, KEYS, self.head_dim, dtype) for _ in range(2)),
            *(plgpu.Barrier(num_barriers=STAGES) for _ in range(2)),
            *(plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES) for _ in range(2)),
        ]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The inputs, in global memory.

    Attributes:
      q, k, v: [B, T, H, D] and [B, S, K, D].
      bounds: [B, n, 2] for each 64 positions: the first key that the queries there see, and the position after the last query.
      scalars: [2], position of the first query over 64, and `Call.block_tiles`, which the compiler must not know: it would unroll
        short loops.
      taken: see `take_slot`.
    """

    q: Any
    k: Any
    v: Any
    bounds: Any
    scalars: Any
    taken: Any


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """The outputs, in global memory: see `Call.outputs`. None if not computed."""

    out: Any
    lse: Any
    workspace: Any = None
    block_scores: Any = None
    token_scores: Any = None


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory of the consumers besides the ring buffers.

    Attributes:
      q_tiles: [2, 64, D], also the staging buffers of the outputs.
      vectors: [2, 3, 64], to pass values between threads.
      rows: [2, Sb], a row of block scores before its division by its sum.
      mailboxes: [2, 1], see `take_slot`.
      q_ready: barriers of the copies into the query tiles.
    """

    q_tiles: Any
    vectors: Any
    rows: Any
    mailboxes: Any
    q_ready: Any


@dataclasses.dataclass(frozen=True)
class _Span:
    """The keys that 64 queries see, and those that their CTA loads.

    Attributes:
      position: position of the first query among the keys.
      first: first key that the queries see.
      end: position after the last query that exists.
      start, tiles: first key that the CTA loads, and number of tiles.
    """

    position: Array
    first: Array
    end: Array
    start: Array
    tiles: Array

    def full_tiles(self) -> Array:
        """Number of leading tiles that every query sees in full."""
        full = lax.div(self.position + 1 - self.start, i32(KEYS))
        return jnp.where(self.first == self.start, jnp.minimum(full, self.tiles), 0)

    def mask(self, scores: Array, t: Array) -> Array:
        key = self.start + t * KEYS
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR)
        return mask(scores, query + 1 - key, self.first - key)

    def exist(self) -> Array:
        """[64]: which of the queries exist."""
        return self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROW_VECTOR) < self.end

    def blocks(self, b: int) -> tuple[Array, Array]:
        """First block that the queries see, and their own block; the block before the first if no query exists."""
        first = lax.div(self.first, i32(b))
        return first, jnp.where(self.end > self.position, lax.div(self.position, i32(b)), first - 1)


@dataclasses.dataclass(frozen=True)
class _Work:
    """The work of a CTA: 128 queries of one head, or of each head of a group.

    Attributes:
      sequence, kv_head: indices of the sequence and the key/value head.
      head: index of the first query head.
      row_tile: index of the 128 queries.
    """

    sequence: Array
    kv_head: Array
    head: Array
    row_tile: Array

    @classmethod
    def of(cls, call: Call, cta: Array) -> "_Work":
        """CTAs of a key/value head are adjacent, so that its keys and values stay in L2; late queries, which see most, start first."""
        per_group = call.group // call.heads_per_cta
        rest, in_group = lax.div(cta, i32(per_group)), lax.rem(cta, i32(per_group))
        rest, number = lax.div(rest, i32(call.row_tiles)), lax.rem(rest, i32(call.row_tiles))
        sequence, kv_head = lax.div(rest, i32(call.kv_heads)), lax.rem(rest, i32(call.kv_heads))
        return cls(sequence, kv_head, kv_head * call.group + in_group, call.row_tiles - 1 - number)

    def spans(self, call: Call, refs: _Inputs) -> tuple[_Span, _Span]:
        """The spans of both consumers."""
        begin = refs.scalars[0] + self.row_tile * CONSUMERS
        (first, end), (other_first, other_end) = (
            [refs.bounds[self.sequence, begin + i, side] for side in range(2)] for i in range(CONSUMERS)
        )
        start = jnp.minimum(first, other_first)
        start = jnp.minimum(start, (call.key_blocks - 1) * call.block_size)
        last = jnp.maximum(end, other_end)
        # At least one tile, so that the loops always have a first one. Without any keys all of it is masked.
        tiles = jnp.maximum(lax.div(last - start + (KEYS - 1), i32(KEYS)), 1)
        one = _Span(begin * QUERIES, first, end, start, tiles)
        return one, _Span((begin + 1) * QUERIES, other_first, other_end, start, tiles)

    def span(self, call: Call, refs: _Inputs, consumer: Array) -> _Span:
        one, other = self.spans(call, refs)
        pick = functools.partial(jnp.where, consumer == 0)
        return dataclasses.replace(
            one,
            position=pick(one.position, other.position),
            first=pick(one.first, other.first),
            end=pick(one.end, other.end),
        )


def ground_truth_kernel(call: Call, dtype: Any, interpret: Any) -> Callable:
    """The kernel from (q, k, v, bounds, scalars, taken), see `_Inputs`, to `Call.outputs`."""

    def kernel(*arguments: Any) -> None:
        refs, arguments = _Inputs(*arguments[:6]), arguments[6:]
        count = len(call.outputs(dtype))
        outputs, arguments = _named_outputs(call, arguments[:count]), arguments[count:]
        q_tiles, vectors, rows, mailboxes, q_ready, *rings = arguments
        scratch, rings = _Scratch(q_tiles, vectors, rows, mailboxes, q_ready), Rings(*rings)
        work = _Work.of(call, lax.axis_index("cta"))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            _consume(call, work, warpgroup, refs, outputs, scratch, rings)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            _produce(call, work, refs, rings)

    return plgpu.kernel(
        kernel,
        out_type=call.outputs(dtype),
        scratch_types=call.scratch(dtype),
        grid=(call.ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )


def _named_outputs(call: Call, refs: tuple[Any, ...]) -> _Outputs:
    out, lse, *others = refs
    asked = zip(
        ("workspace", "block_scores", "token_scores"), (call.scored, call.block_scores, call.token_scores), strict=True
    )
    return _Outputs(out, lse, **dict(zip((name for name, there in asked if there), others, strict=True)))


def _produce(call: Call, work: _Work, refs: _Inputs, rings: Rings) -> None:
    """Loads keys and values, once per head."""
    span = work.spans(call, refs)[0]
    fills = span.tiles * call.heads_per_cta

    @pl.loop(i32(0), fills)
    def _(number: Array) -> None:
        t = lax.rem(number, span.tiles) if call.heads_per_cta > 1 else number
        keys = pl.ds(pl.multiple_of(span.start + t * KEYS, QUERIES), KEYS)
        stage = number & (STAGES - 1)

        def fill(source: Any, target: Any, ready: Any, free: Any) -> None:
            pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
            plgpu.copy_gmem_to_smem(source.at[work.sequence, keys, work.kv_head], target.at[stage], ready.at[stage])

        fill(refs.k, rings.k_tiles, rings.k_ready, rings.k_free)
        fill(refs.v, rings.v_tiles, rings.v_ready, rings.v_free)

    if call.interpreted:
        # The interpreter requires a wait for every completed phase of a barrier.
        for free in (rings.k_free, rings.v_free):

            @pl.loop(jnp.maximum(fills - STAGES, 0), fills)
            def _(number: Array, free: Any = free) -> None:
                plgpu.barrier_wait(free.at[number & (STAGES - 1)])


def _consume(
    call: Call, work: _Work, consumer: Array, refs: _Inputs, outputs: _Outputs, scratch: _Scratch, rings: Rings
) -> None:
    """Attention and scores of 64 queries, of one head or of each head of a group."""
    start = work.row_tile * (CONSUMERS * QUERIES) + consumer * QUERIES
    q_tile, q_ready = scratch.q_tiles.at[consumer], scratch.q_ready.at[consumer]
    vectors = scratch.vectors.at[consumer]

    def tokens(in_cta: Array) -> tuple[Any, ...]:
        return work.sequence, pl.ds(start, QUERIES), work.head + in_cta

    def load(in_cta: Array) -> None:
        plgpu.copy_gmem_to_smem(refs.q.at[tokens(in_cta)], q_tile, q_ready)

    load(i32(0))
    slot = None
    if call.scored:
        mailbox, cta = scratch.mailboxes.at[consumer], lax.axis_index("cta")
        number = take_slot(refs.taken, mailbox, cta, consumer, interpreted=call.interpreted)
        slot = outputs.workspace.at[number]

    def attend(in_cta: Array) -> None:
        span = work.span(call, refs, consumer)
        plgpu.barrier_wait(q_ready)
        q = q_tile if call.interpreted else q_tile[...]
        with jax.named_scope("attention"):
            state = _attend(call, span, q, in_cta * span.tiles, rings, slot)
        out, lse = state.finish(span.exist())
        q_tile[...] = out.astype(q_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, outputs.out.at[tokens(in_cta)])
        head = work.head + in_cta
        there = start < call.rows

        @pl.when(there)
        def _():
            target = outputs.lse.at[work.sequence, :, head]
            store_inside(lse, target, start, layout=ROW_VECTOR, interpreted=call.interpreted)

        plgpu.wait_smem_to_gmem(0)
        if slot is None:
            return
        pl.when(in_cta + 1 < call.heads_per_cta)(lambda: load(in_cta + 1))
        # Read again: if kept, the loop over tiles would lack its registers.
        span = work.span(call, refs, consumer)
        seen = span.exist() & (state.total > 0)
        weight = _Weight(call.slot_scale, state.maximum, jnp.where(seen, 1 / jnp.where(seen, state.total, 1), 0))
        vectors[0], vectors[1] = weight.maximum, weight.inverse
        plgpu.commit_smem()  # also makes this thread's stores to the slot visible to the others
        if outputs.token_scores is not None:

            @pl.when(there)
            def _():
                target = outputs.token_scores.at[work.sequence, work.kv_head]
                with jax.named_scope("token_scores"):
                    _token_scores(call, span, weight, slot, target, start, in_cta, refs.scalars[1])

        if outputs.block_scores is not None:
            target = outputs.block_scores.at[work.sequence, head]
            row = lax.div(start, i32(QUERIES))
            with jax.named_scope("block_scores"):
                _block_scores(call, span, slot, vectors, scratch.rows.at[consumer], target, row, refs.scalars[1])

    if call.heads_per_cta == 1:
        attend(i32(0))
    else:

        @pl.loop(i32(0), i32(call.heads_per_cta))
        def _(in_cta: Array) -> None:
            attend(in_cta)
            plgpu.commit_smem()  # the other threads have read the slot before the next head is stored there

    if call.scored:
        give_back_slot(refs.taken, number, interpreted=call.interpreted)


def _attend(call: Call, span: _Span, q: Any, done: Array, rings: Rings, slot: Any) -> Softmax:
    """Attends to all tiles, and stores the statistic of each block in the slot. `done` tiles went through the rings before.

    The slot gets the largest product of a block, or the logarithm, in base 2, of the sum of exp2(score) over the block.
    """
    b, dtype = call.block_size, rings.v_tiles.dtype

    def per_block(x: Array) -> list[Array]:
        """The columns of each block."""
        return [x[:, i * b : (i + 1) * b] for i in range(call.per_tile)]

    def store(t: Array, values: list[Array]) -> None:
        block = lax.div(span.start, i32(b)) + t * call.per_tile
        for i, x in enumerate(values):
            slot[block + i] = x

    def weigh(t: Array, masked: bool, scores: Array, state: Softmax) -> tuple[Array, Array, Array, Array]:
        scores = span.mask(scores, t) if masked else scores
        if slot is None:
            maximum, total, weights, factor = state.add(scores, call.c)
        elif call.by_mass:
            maximum, weights, factor = state.weigh(scores, call.c)
            sums = [x.sum(axis=1) for x in per_block(weights)]
            total = state.total * factor + functools.reduce(jnp.add, sums)
            store(t, [maximum + jnp.log2(x) for x in sums])
        else:
            largest = [x.max(axis=1) for x in per_block(scores)]
            store(t, largest)
            maximum, total, weights, factor = state.add(scores, call.c, functools.reduce(jnp.maximum, largest))
        return maximum, total, weights.astype(dtype), factor

    def stage(t: Array) -> Array:
        return (done + t) & (STAGES - 1)

    def step(t: Array, carry: tuple[Softmax, Array], *, masked: bool) -> tuple[Softmax, Array]:
        stages = stage(t), stage(t - 1)
        return rings.step(q, stages, carry, functools.partial(weigh, t, masked), call.interpreted)

    first, full = i32(0), span.full_tiles()
    carry = rings.first(q, stage(first), call.head_dim, functools.partial(weigh, first, True))
    carry = lax.fori_loop(i32(1), full, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(jnp.maximum(full, 1), span.tiles, functools.partial(step, masked=True), carry)
    return rings.last(stage(span.tiles - 1), carry, call.interpreted)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Softmax statistics [64] that turn what a slot holds into attention weights, in the layout of rows or columns.

    Attributes:
      scale: see `Call.slot_scale`.
      maximum, inverse: final maximum of each query's scores in base 2, and 1 over its sum; 0 for queries that see no key.
    """

    scale: float
    maximum: Array
    inverse: Array

    def of(self, values: Array, axis: int) -> Array:
        """The weights of values [64, 64] with the queries along `axis`; 0 for queries that do not exist, whose values may be NaN."""
        maximum, inverse = (lax.broadcast_in_dim(x, values.shape, [axis]) for x in (self.maximum, self.inverse))
        return jnp.where(inverse > 0, jnp.exp2(values * self.scale - maximum) * inverse, 0.0)


def _block_scores(
    call: Call, span: _Span, slot: Any, vectors: Any, row: Any, target: Any, number: Array, every: Array
) -> None:
    """Stores row `number` of a head's block scores [T / 64, Sb]: each block's weight for the query that has most, divided by their sum
    unless `Call.divided_later`."""
    first, own = span.blocks(call.block_size)
    begin, end = lax.div(first, i32(BLOCKS)), lax.div(own + BLOCKS, i32(BLOCKS))
    weight = _Weight(call.slot_scale, *(plgpu.load(vectors.at[i], layout=COLUMN_VECTOR) for i in range(2)))

    def scores_of(t: Array) -> Array:
        weights = weight.of(plgpu.load(slot.at[pl.ds(t * BLOCKS, BLOCKS)], layout=MATRIX, optimized=False), 1)
        block = t * BLOCKS + plgpu.broadcasted_iota(jnp.int32, (BLOCKS,), 0, layout=ROW_VECTOR)
        return jnp.where((block >= first) & (block <= own), weights.max(axis=1), 0.0)

    def largest(t: Array, sums: Array) -> Array:
        scores = scores_of(t)
        row[pl.ds(t * BLOCKS, BLOCKS)] = scores
        return sums + scores

    def store(of: Callable[[Array], Array]) -> None:
        @pl.loop(i32(0), every)
        def _(t: Array) -> None:
            scores = lax.cond((t >= begin) & (t < end), lambda: of(t), lambda: zeros)

            @pl.when(number < target.shape[0])
            def _():
                store_inside(scores, target.at[number], t * BLOCKS, layout=ROW_VECTOR, interpreted=call.interpreted)

    zeros = plgpu.layout_cast(jnp.full((BLOCKS,), 0, jnp.float32), ROW_VECTOR)
    if call.divided_later:
        store(scores_of)
        return
    vectors[2] = lax.fori_loop(begin, end, largest, zeros)
    plgpu.commit_smem()
    sums = plgpu.load(vectors.at[2], layout=COLUMN_VECTOR)
    total = lax.broadcast_in_dim(sums, (BLOCKS, BLOCKS), [1]).sum(axis=1)  # the same in each row
    factor = 1 / jnp.where(total > 0, total, 1)
    if call.block_size > QUERIES:
        # Two rows form one, which is divided once they are combined.
        factor = zeros + 1
    store(lambda t: plgpu.load(row.at[pl.ds(t * BLOCKS, BLOCKS)], layout=ROW_VECTOR) * factor)


def _token_scores(
    call: Call, span: _Span, weight: _Weight, slot: Any, target: Any, start: Array, in_group: Array, every: Array
) -> None:
    """Joins the weights of a head to the 64 rows from `start` on of a group's token scores [T, Sb]: their maximum over the heads, or
    their sum. Divides the rows by their sums after the last head."""
    first, own = span.blocks(call.block_size)
    begin, end = lax.div(first, i32(BLOCKS)), lax.div(own + (BLOCKS - 1), i32(BLOCKS))
    edge: dict[str, Any] = dict(layout=MATRIX, interpreted=call.interpreted)
    shape = QUERIES, BLOCKS

    def completed(t: Array, scores: Array) -> Array:
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        thread = column & 6  # see `flash_tiles.mask`
        constant, begins, ends = column - thread, first - t * BLOCKS - thread, own - t * BLOCKS - thread
        return jnp.where((constant >= begins) & (constant < ends), scores, 0.0)

    def before(t: Array) -> Array:
        return load_inside(target, start, t * BLOCKS, shape=shape, **edge)

    join = jnp.add if call.by_mass else jnp.maximum

    def joined(t: Array, sums: Array) -> Array:
        weights = weight.of(load_transposed(slot.at[pl.ds(t * BLOCKS, BLOCKS)], **edge), 0)
        others = jnp.broadcast_to(in_group > 0, shape)
        scores = completed(t, jnp.where(others, join(weights, before(t)), weights))
        store_inside(scores, target, start, t * BLOCKS, **edge)
        return sums + scores.sum(axis=1)

    total = lax.fori_loop(begin, end, joined, plgpu.layout_cast(jnp.full((QUERIES,), 0, jnp.float32), ROW_VECTOR))

    @pl.when(in_group == call.group - 1)
    def _():
        factor = 1 / jnp.where(total > 0, total, 1)
        zeros = plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), MATRIX)

        @pl.loop(i32(0), every)
        def _(t: Array) -> None:
            def scores() -> Array:
                return completed(t, before(t) * columns(factor, zeros))

            scaled = lax.cond((t >= begin) & (t < end), scores, lambda: zeros)
            store_inside(scaled, target, start, t * BLOCKS, **edge)

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

from pallas_kernels.block_ground_truth.workspace_slots import give_back_strip, pool_size, take_strip
from pallas_kernels.mosaic.edge_tiles import load_inside, load_transposed, store_inside
from pallas_kernels.mosaic.flash_tiles import MATRIX, QUERIES, ROWS, Rings, Softmax, columns, i32, mask, tile

CONSUMERS = 2  # warpgroups that compute
KEYS = 128  # of a tile
SLOTS = 2  # tiles in a ring, a power of two
BLOCKS = 64  # whose scores are finished at a time
COLUMNS = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel is compiled for.

    Attributes:
      batch, heads, kv_heads, head_dim: B, H, K, D.
      rows, padded_rows: T, and that of q, which may have some more.
      key_blocks: Sb.
      block_size: b, 64 or 128.
      block_scores, token_scores: which are asked for.
      c: factor on the products of queries and keys that makes them scores in base 2; above 0.
      interpreted: whether JAX's interpreter runs it.
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
        """Token scores are the maximum over the heads of a group: a CTA takes one after the other."""
        return self.group if self.token_scores else 1

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // (CONSUMERS * QUERIES))

    @property
    def ctas(self) -> int:
        return self.batch * self.heads // self.heads_per_cta * self.row_tiles

    @property
    def pool(self) -> int:
        """How many strips there are."""
        return pool_size(self.ctas, CONSUMERS, interpreted=self.interpreted)

    @property
    def per_tile(self) -> int:
        """Key blocks in a tile."""
        return KEYS // self.block_size

    @property
    def block_tiles(self) -> int:
        """Tiles of key blocks in a row of scores."""
        return -(-self.key_blocks // BLOCKS)

    def outputs(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Output [B, T, H, D], lse [B, T, H], and as far as asked for: strips, block scores [B, H, T / 64, Sb], token scores [B, K, T, Sb].

        In the interpreter whole tiles, since it does not run what keeps within the borders.
        """
        rows, blocks = self.rows, self.key_blocks
        if self.interpreted:
            rows, blocks = self.row_tiles * CONSUMERS * QUERIES, self.block_tiles * BLOCKS
        shapes: list[tuple[int, ...]] = [(self.batch, rows, self.heads)]
        if self.scored:
            # The last tile may reach one block beyond the last.
            shapes.append((self.pool, self.block_tiles * BLOCKS + 1, QUERIES))
        if self.block_scores:
            shapes.append((self.batch, self.heads, -(-rows // QUERIES), blocks))
        if self.token_scores:
            shapes.append((self.batch, self.kv_heads, rows, blocks))
        output = jax.ShapeDtypeStruct((self.batch, self.padded_rows, self.heads, self.head_dim), dtype)
        return [output, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)]

    def scratch(self, dtype: Any) -> list[Any]:
        """Shared memory, in the order of `_Scratch` and `Rings`."""
        row = self.block_tiles * BLOCKS if self.block_scores else 1
        return [
            tile(CONSUMERS, QUERIES, self.head_dim, dtype),
            plgpu.SMEM((CONSUMERS, 3, QUERIES), jnp.float32),
            plgpu.SMEM((CONSUMERS, row), jnp.float32),
            plgpu.SMEM((CONSUMERS, 1), jnp.int32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            *(tile(SLOTS, KEYS, self.head_dim, dtype) for _ in range(2)),
            *(plgpu.Barrier(num_barriers=SLOTS) for _ in range(2)),
            *(plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS) for _ in range(2)),
        ]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """In global memory.

    Attributes:
      q, k, v: [B, T, H, D] and [B, S, K, D].
      bounds: [B, n, 2] for each 64 positions: the first key that queries there see, and the position after their last one.
      numbers: [2], position of the first query over 64, and `Call.block_tiles`, lest a loop of a few rounds is written out.
      taken: see `take_strip`.
    """

    q: Any
    k: Any
    v: Any
    bounds: Any
    numbers: Any
    taken: Any


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """In global memory: see `Call.outputs`. None where it is not asked for."""

    out: Any
    lse: Any
    strips: Any = None
    block_scores: Any = None
    token_scores: Any = None


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory besides the rings, of each consumer.

    Attributes:
      q_tiles: [2, 64, D]; outputs leave through it.
      vectors: [2, 3, 64], to pass numbers between threads.
      rows: [2, Sb], a row of block scores before it is divided by its sum.
      notes: [2, 1], see `take_strip`.
      q_ready: barriers of the copies into the query tiles.
    """

    q_tiles: Any
    vectors: Any
    rows: Any
    notes: Any
    q_ready: Any


@dataclasses.dataclass(frozen=True)
class _Span:
    """The keys that 64 queries see, and those that their CTA loads for them.

    Attributes:
      position: of the first query, among the keys.
      first, end: first key they see; position after the last query that is one.
      start, tiles: first key that the CTA loads, and how many tiles.
    """

    position: Array
    first: Array
    end: Array
    start: Array
    tiles: Array

    def full_tiles(self) -> Array:
        """How many tiles, from the first on, every query sees in full."""
        full = lax.div(self.position + 1 - self.start, i32(KEYS))
        return jnp.where(self.first == self.start, jnp.minimum(full, self.tiles), 0)

    def mask(self, scores: Array, t: Array) -> Array:
        key = self.start + t * KEYS
        query = self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS)
        return mask(scores, query + 1 - key, self.first - key)

    def exist(self) -> Array:
        """[64]: which of the queries there are."""
        return self.position + plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=ROWS) < self.end

    def blocks(self, b: int) -> tuple[Array, Array]:
        """First block that the queries see, and the one that they are in; as many as the first where there are no queries."""
        first = lax.div(self.first, i32(b))
        return first, jnp.where(self.end > self.position, lax.div(self.position, i32(b)), first - 1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a CTA works on.

    Attributes:
      sequence, kv_head: which.
      head: first query head.
      row_tile: which 128 queries.
    """

    sequence: Array
    kv_head: Array
    head: Array
    row_tile: Array

    @classmethod
    def of(cls, call: Call, cta: Array) -> "_Place":
        """All work of a key/value head is contiguous in time, so that its keys and values stay in L2; late queries start first."""
        per_group = call.group // call.heads_per_cta
        rest, in_group = lax.div(cta, i32(per_group)), lax.rem(cta, i32(per_group))
        rest, number = lax.div(rest, i32(call.row_tiles)), lax.rem(rest, i32(call.row_tiles))
        sequence, kv_head = lax.div(rest, i32(call.kv_heads)), lax.rem(rest, i32(call.kv_heads))
        return cls(sequence, kv_head, kv_head * call.group + in_group, call.row_tiles - 1 - number)

    def spans(self, call: Call, refs: _Inputs) -> tuple[_Span, _Span]:
        """Of the consumers."""
        begin = refs.numbers[0] + self.row_tile * CONSUMERS
        (first, end), (other_first, other_end) = (
            [refs.bounds[self.sequence, begin + i, side] for side in range(2)] for i in range(CONSUMERS)
        )
        start = jnp.minimum(first, other_first)
        start = jnp.minimum(start, (call.key_blocks - 1) * call.block_size)
        last = jnp.maximum(end, other_end)
        # Without any keys they take one tile, all of it hidden: so the loops have a first tile in any case.
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
    """From q, k, v, bounds, numbers and taken (see `_Inputs`) to what `Call.outputs` tells."""

    def kernel(*arguments: Any) -> None:
        refs, arguments = _Inputs(*arguments[:6]), arguments[6:]
        count = len(call.outputs(dtype))
        outputs, arguments = _named_outputs(call, arguments[:count]), arguments[count:]
        q_tiles, vectors, rows, notes, q_ready, *rings = arguments
        scratch, rings = _Scratch(q_tiles, vectors, rows, notes, q_ready), Rings(*rings)
        place = _Place.of(call, lax.axis_index("cta"))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            _consume(call, place, warpgroup, refs, outputs, scratch, rings)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            _produce(call, place, refs, rings)

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
        ("strips", "block_scores", "token_scores"), (call.scored, call.block_scores, call.token_scores), strict=True
    )
    return _Outputs(out, lse, **dict(zip((name for name, there in asked if there), others, strict=True)))


def _produce(call: Call, place: _Place, refs: _Inputs, rings: Rings) -> None:
    """Loads keys and values, for each head once."""
    span = place.spans(call, refs)[0]
    fills = span.tiles * call.heads_per_cta

    @pl.loop(i32(0), fills)
    def _(number: Array) -> None:
        t = lax.rem(number, span.tiles) if call.heads_per_cta > 1 else number
        keys = pl.ds(pl.multiple_of(span.start + t * KEYS, QUERIES), KEYS)
        slot = number & (SLOTS - 1)

        def fill(source: Any, target: Any, ready: Any, free: Any) -> None:
            pl.when(number >= SLOTS)(lambda: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[place.sequence, keys, place.kv_head], target.at[slot], ready.at[slot])

        fill(refs.k, rings.k_tiles, rings.k_ready, rings.k_free)
        fill(refs.v, rings.v_tiles, rings.v_ready, rings.v_free)

    if call.interpreted:  # which insists that a completed phase is seen by someone
        for free in (rings.k_free, rings.v_free):

            @pl.loop(jnp.maximum(fills - SLOTS, 0), fills)
            def _(number: Array, free: Any = free) -> None:
                plgpu.barrier_wait(free.at[number & (SLOTS - 1)])


def _consume(
    call: Call, place: _Place, consumer: Array, refs: _Inputs, outputs: _Outputs, scratch: _Scratch, rings: Rings
) -> None:
    """64 queries of one head, or of each head of a group."""
    start = place.row_tile * (CONSUMERS * QUERIES) + consumer * QUERIES
    q_tile, q_ready = scratch.q_tiles.at[consumer], scratch.q_ready.at[consumer]
    vectors = scratch.vectors.at[consumer]

    def tokens(in_cta: Array) -> tuple[Any, ...]:
        return place.sequence, pl.ds(start, QUERIES), place.head + in_cta

    def load(in_cta: Array) -> None:
        plgpu.copy_gmem_to_smem(refs.q.at[tokens(in_cta)], q_tile, q_ready)

    load(i32(0))
    strip = None
    if call.scored:
        note, cta = scratch.notes.at[consumer], lax.axis_index("cta")
        number = take_strip(refs.taken, note, cta, consumer, interpreted=call.interpreted)
        strip = outputs.strips.at[number]

    def attend(in_cta: Array) -> None:
        span = place.span(call, refs, consumer)
        plgpu.barrier_wait(q_ready)
        q = q_tile if call.interpreted else q_tile[...]
        state = _attend(call, span, q, in_cta * span.tiles, rings, strip)
        out, lse = state.finish(span.exist())
        q_tile[...] = out.astype(q_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, outputs.out.at[tokens(in_cta)])
        head = place.head + in_cta
        there = start < call.rows

        @pl.when(there)
        def _():
            target = outputs.lse.at[place.sequence, :, head]
            store_inside(lse, target, start, layout=ROWS, interpreted=call.interpreted)

        plgpu.wait_smem_to_gmem(0)
        if strip is None:
            return
        pl.when(in_cta + 1 < call.heads_per_cta)(lambda: load(in_cta + 1))
        # Read again: kept in registers, it would be in the way of the loop over tiles.
        span = place.span(call, refs, consumer)
        seen = span.exist() & (state.total > 0)
        weight = _Weight(call.c, state.maximum, jnp.where(seen, 1 / jnp.where(seen, state.total, 1), 0))
        vectors[0], vectors[1] = weight.maximum, weight.inverse
        plgpu.commit_smem()  # also before others read what this thread has written to the strip
        if outputs.token_scores is not None:

            @pl.when(there)
            def _():
                target = outputs.token_scores.at[place.sequence, place.kv_head]
                _token_scores(call, span, weight, strip, target, start, in_cta, refs.numbers[1])

        if outputs.block_scores is not None:
            target = outputs.block_scores.at[place.sequence, head]
            row = lax.div(start, i32(QUERIES))
            _block_scores(call, span, strip, vectors, scratch.rows.at[consumer], target, row, refs.numbers[1])

    if call.heads_per_cta == 1:
        attend(i32(0))
    else:

        @pl.loop(i32(0), i32(call.heads_per_cta))
        def _(in_cta: Array) -> None:
            attend(in_cta)
            plgpu.commit_smem()  # before this thread writes what others read of the strip

    if call.scored:
        give_back_strip(refs.taken, number, interpreted=call.interpreted)


def _attend(call: Call, span: _Span, q: Any, done: Array, rings: Rings, strip: Any) -> Softmax:
    """Walks the tiles; `done` have come before in the rings. The largest product of each block goes to the strip."""
    b, dtype = call.block_size, rings.v_tiles.dtype

    def weigh(t: Array, masked: bool, scores: Array, state: Softmax) -> tuple[Array, Array, Array, Array]:
        scores = span.mask(scores, t) if masked else scores
        if strip is None:
            maximum, total, weights, factor = state.add(scores, call.c)
        else:
            largest = [scores[:, i * b : (i + 1) * b].max(axis=1) for i in range(call.per_tile)]
            block = lax.div(span.start, i32(b)) + t * call.per_tile
            for i, x in enumerate(largest):
                strip[block + i] = x
            maximum, total, weights, factor = state.add(scores, call.c, functools.reduce(jnp.maximum, largest))
        return maximum, total, weights.astype(dtype), factor

    def slot(t: Array) -> Array:
        return (done + t) & (SLOTS - 1)

    def step(t: Array, carry: tuple[Softmax, Array], *, masked: bool) -> tuple[Softmax, Array]:
        slots = slot(t), slot(t - 1)
        return rings.step(q, slots, carry, functools.partial(weigh, t, masked), call.interpreted)

    first, full = i32(0), span.full_tiles()
    carry = rings.first(q, slot(first), call.head_dim, functools.partial(weigh, first, True))
    carry = lax.fori_loop(i32(1), full, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(jnp.maximum(full, 1), span.tiles, functools.partial(step, masked=True), carry)
    return rings.last(slot(span.tiles - 1), carry, call.interpreted)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """What makes a query's products its attention weights: [64], in the layout of rows or of columns."""

    c: float
    maximum: Array
    inverse: Array

    def of(self, products: Array, axis: int) -> Array:
        """Products [64, 64], with the queries on `axis`, as weights."""
        maximum, inverse = (lax.broadcast_in_dim(x, products.shape, [axis]) for x in (self.maximum, self.inverse))
        return jnp.exp2(products * self.c - maximum) * inverse


def _block_scores(
    call: Call, span: _Span, strip: Any, vectors: Any, row: Any, target: Any, number: Array, every: Array
) -> None:
    """Row `number` of a head's block scores [T / 64, Sb]: the largest weight in each block, over the sum of these."""
    first, own = span.blocks(call.block_size)
    begin, end = lax.div(first, i32(BLOCKS)), lax.div(own + BLOCKS, i32(BLOCKS))
    weight = _Weight(call.c, *(plgpu.load(vectors.at[i], layout=COLUMNS) for i in range(2)))

    def largest(t: Array, sums: Array) -> Array:
        here = pl.ds(t * BLOCKS, BLOCKS)
        weights = weight.of(plgpu.load(strip.at[here], layout=MATRIX, optimized=False), 1)
        block = t * BLOCKS + plgpu.broadcasted_iota(jnp.int32, (BLOCKS,), 0, layout=ROWS)
        scores = jnp.where((block >= first) & (block <= own), weights.max(axis=1), 0.0)
        row[here] = scores
        return sums + scores

    zeros = plgpu.layout_cast(jnp.full((BLOCKS,), 0, jnp.float32), ROWS)
    vectors[2] = lax.fori_loop(begin, end, largest, zeros)
    plgpu.commit_smem()
    sums = plgpu.load(vectors.at[2], layout=COLUMNS)
    total = lax.broadcast_in_dim(sums, (BLOCKS, BLOCKS), [1]).sum(axis=1)  # in each row the same
    factor = 1 / jnp.where(total > 0, total, 1)
    if call.block_size > QUERIES:  # two rows make one; what is made of them is divided elsewhere
        factor = zeros + 1

    @pl.loop(i32(0), every)
    def _(t: Array) -> None:
        scores = lax.cond(
            (t >= begin) & (t < end),
            lambda: plgpu.load(row.at[pl.ds(t * BLOCKS, BLOCKS)], layout=ROWS) * factor,
            lambda: zeros,
        )

        @pl.when(number < target.shape[0])
        def _():
            store_inside(scores, target.at[number], t * BLOCKS, layout=ROWS, interpreted=call.interpreted)


def _token_scores(
    call: Call, span: _Span, weight: _Weight, strip: Any, target: Any, start: Array, in_group: Array, every: Array
) -> None:
    """Rows `start` and so on of a group's token scores [T, Sb]: raised to the weights of another head, and divided after the last."""
    first, own = span.blocks(call.block_size)
    begin, end = lax.div(first, i32(BLOCKS)), lax.div(own + (BLOCKS - 1), i32(BLOCKS))
    borders: dict[str, Any] = dict(layout=MATRIX, interpreted=call.interpreted)
    shape = QUERIES, BLOCKS

    def completed(t: Array, scores: Array) -> Array:
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        thread = column & 6  # see `flash_tiles.mask`
        constant, begins, ends = column - thread, first - t * BLOCKS - thread, own - t * BLOCKS - thread
        return jnp.where((constant >= begins) & (constant < ends), scores, 0.0)

    def before(t: Array) -> Array:
        return load_inside(target, start, t * BLOCKS, shape=shape, **borders)

    def largest(t: Array, sums: Array) -> Array:
        weights = weight.of(load_transposed(strip.at[pl.ds(t * BLOCKS, BLOCKS)], **borders), 0)
        others = jnp.broadcast_to(in_group > 0, shape)
        raised = jnp.where(others, jnp.maximum(weights, before(t)), weights)
        scores = completed(t, raised)
        store_inside(scores, target, start, t * BLOCKS, **borders)
        return sums + scores.sum(axis=1)

    total = lax.fori_loop(begin, end, largest, plgpu.layout_cast(jnp.full((QUERIES,), 0, jnp.float32), ROWS))

    @pl.when(in_group == call.group - 1)
    def _():
        factor = 1 / jnp.where(total > 0, total, 1)
        zeros = plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), MATRIX)

        @pl.loop(i32(0), every)
        def _(t: Array) -> None:
            def scores() -> Array:
                return completed(t, before(t) * columns(factor, zeros))

            scaled = lax.cond((t >= begin) & (t < end), scores, lambda: zeros)
            store_inside(scaled, target, start, t * BLOCKS, **borders)

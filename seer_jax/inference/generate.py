"""Generation: a prompt is read in one pass or in chunks, then tokens follow one by one, all in one compiled program.

The cache has a fixed size, so a program is compiled once per batch size, policy, and prompt width and number of new tokens, both
rounded up (`prompts.bucket`); where prompts are read in chunks, once per size of the cache (`request.chunked_capacity`) in place of the prompt width. Everything that depends on values (lengths, tokens, logits that are not finite) is checked on the host,
before or after. Where the device tells its memory, what the program takes of it is checked before it runs.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from seer_jax.checks import whole_number
from seer_jax.inference.memory import (
    MemoryPlan,
    abstract_argument,
    available_memory,
    device_bytes,
    laid_out_bytes,
    tree_bytes,
)
from seer_jax.inference.prompts import Lengths, Prompts, check_prompts
from seer_jax.inference.request import ProgramSizes, Request, RequestSettings
from seer_jax.inference.sampling import Greedy, Sample, Sampling, row_keys
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer, check_weights
from seer_jax.selection.policies import Lists, Policy
from seer_jax.sharding.layout import Layout
from seer_jax.sharding.mesh import make_abstract_mesh
from seer_jax.sharding.planned import planned_model, planned_policy, planned_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
      tokens: the new tokens, without the prompt. A row ends with its EOS token; after it every entry is the first of the
        `eos` tokens.
      lengths: new tokens of each row, its EOS token included.
      prefill_kept: share of the causal blocks that each layer and row kept while the prompt was read.
      decode_kept_steps: share of the visible blocks that each layer and row kept at each decoding step; step s feeds new token
        s and makes new token s + 1, so there are N - 1. Row b makes the first `lengths[b] - 1` of them; its other entries are
        0, which the share of a step that was made never is.
      failed: number of the new token at which a row ended because its logits held NaN or infinity; -1 for the others.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    prefill_kept: Float[Array, "L B"]
    decode_kept_steps: Float[Array, "N-1 L B"]
    failed: Int[Array, "B"]

    @property
    def decode_kept(self) -> Float[Array, "L B"]:
        """Share of the visible blocks kept by each layer and row, mean over the row's decoding steps; 1 where it made none."""
        steps = self.lengths[None] - 1
        return jnp.where(steps > 0, self.decode_kept_steps.sum(0) / jnp.maximum(steps, 1), 1.0)

    def rows(self) -> list[list[int]]:
        """The new tokens of each row, its EOS token included, nothing after it."""
        return [row[:n].tolist() for row, n in zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)]


def generate(
    model: Transformer, tokens: Prompts, lengths: Lengths | None = None, **settings: Unpack[RequestSettings]
) -> Generated:
    """Continues each prompt until it ends or `max_new_tokens` are there.

    Args:
      model: with a decode gate where `decode` ranks by it, a prefill gate where `prefill` does.
      tokens: integers [B, T] in [0, vocab_size), right-padded with anything; see `pad_prompts`.
      lengths: tokens of each prompt, integers [B] in [1, T]; None: all T.
      **settings: `max_new_tokens`, and optionally `prefill`, `decode`, `sampling`, `key`, `eos`, `cache_capacity`, `beyond_context`
        and `prefill_chunk`; see `Request`.

    Returns:
      See `Generated`.

    Raises:
      ValueError: an argument is outside its domain, the tokens don't fit the cache or the model's context, a policy needs a
        gate that the model has not or leaves none of its layers sparse, or the logits of every row are not finite from the start.
      MemoryError: weights, cache and scratch of the compiled program do not fit the device, as far as it tells its
        memory. Nothing has been allocated then; see `plan_memory`.

    Warns:
      RuntimeWarning: logits of some rows are not finite. Those rows end there, see `Generated.failed`; the others are complete.
    """
    job = _make_job(model, tokens, lengths, Request.of(model, **settings))
    _check_memory(model, job)
    return _result(job, _run(model, job))


def stream(
    model: Transformer,
    tokens: Prompts,
    lengths: Lengths | None = None,
    *,
    chunk: int = 8,
    **settings: Unpack[RequestSettings],
) -> Generator[list[list[int]], None, Generated]:
    """As `generate`, but gives the tokens while they are made.

    Args:
      chunk: tokens that are made on the device before the host looks; the first token comes at once.
      (the others): see `generate`.

    Yields:
      For each row the tokens that are new since the last time, none for a row that has ended. Joined they are exactly
      `generate(...).rows()`.

    Returns:
      As the generator's value (`result = yield from stream(...)`) what `generate` returns.

    Raises:
      ValueError: as `generate`; for the arguments at once, not when the first token is asked for.
      MemoryError: as `generate`; for weights and cache at once, for the compiled programs when the first token is asked for.

    Warns:
      RuntimeWarning: as `generate`, after the last tokens.
    """
    whole_number("chunk", chunk)
    job = _make_job(model, tokens, lengths, Request.of(model, **settings))
    _check_memory(model, job, compiled=False)
    return _stream(model, job, chunk)


def _stream(model: Transformer, job: "_Job", chunk: int) -> Generator[list[list[int]], None, Generated]:
    _check_memory(model, job, streamed=True)
    return (yield from _stream_from(model, job, _start(model, job), chunk))


def _stream_from(
    model: Transformer, job: "_Job", state: "_State", chunk: int, keep: Callable[["_State"], None] = lambda state: None
) -> Generator[list[list[int]], None, Generated]:
    """Yields what a state has, and goes on from it; `keep` gets each state, in place of the one before, whose cache is gone."""
    shown, most = 0, int(job.until)
    while True:
        keep(state)
        rows, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
        yield [row[shown:n].tolist() for row, n in zip(rows, lengths, strict=True)]
        shown = int(state.step)
        if shown == most or np.asarray(state.ended).all():
            return _result(job, state)
        state = _continue(model, job, state, min(shown + chunk, most))


def stream_behind(
    model: Transformer,
    request: Request,
    tokens: Sequence[int],
    cache: Cache,
    start: int,
    sizes: ProgramSizes,
    *,
    chunk: int,
    keep: Callable[[Cache, list[int]], None],
) -> Generator[list[list[int]], None, Generated]:
    """As `stream` of one row, behind the first `start` tokens, which a cache has; see `Conversation`.

    Args:
      request: checked against the model.
      tokens: from position `start` on.
      cache: with these `start` tokens; it is given away.
      start: a multiple of the block sizes.
      sizes: with `chunk`; its width has room for the tokens.
      chunk: new tokens at a time.
      keep: gets the cache and the new tokens so far, before they are yielded.
    """
    prompts, counts = check_prompts([tokens], None, vocab_size=model.config.vocab_size)
    request.require_key()
    keys = None if request.key is None or isinstance(request.sampling, Greedy) else row_keys(request.key, 1)
    prompts = np.pad(prompts, ((0, 0), (0, sizes.width - prompts.shape[1])))
    job = _Job.of(model, request, prompts, counts, keys, sizes)

    def hand_over(state: _State) -> None:
        assert state.cache is not None
        keep(state.cache, np.asarray(state.tokens)[0, : int(state.lengths[0])].tolist())

    state = _resume(model, job, cache, np.asarray(start, np.int32))
    return _stream_from(model, job, state, chunk, hand_over)


def plan_memory(
    model: Transformer,
    batch: int,
    prompt_width: int,
    *,
    streamed: bool = False,
    compiled: bool = True,
    available: int | None = None,
    mesh: str | Mesh | AbstractMesh | None = None,
    **settings: Unpack[RequestSettings],
) -> MemoryPlan:
    """What `generate` would take of its device's memory, on a mesh of the memory of each device. Nothing is allocated.

    Args:
      model: with weights, or of shapes alone (`from_pretrained(..., abstract=True)`), on a mesh or not.
      batch: B, rows.
      prompt_width: T, tokens of the longest prompt.
      streamed: of `stream` in place of `generate`: the larger of its two programs.
      compiled: compile the program, which a later `generate` or `stream` with the same shapes need not do again, and read
        off what it takes besides weights and cache. False: at once, without scratch.
      available: bytes that there are for weights, cache and scratch, on a mesh on each device; None: what the device tells.
      mesh: devices over which a model that is not on a mesh would be spread, such as "tensor=8". They need not be there: scratch is then
        that of one device's part, compiled for the device that is here. None: as the model lies.
      **settings: see `Request`; a key need not be given.

    Returns:
      See `MemoryPlan`; its `check` raises where the plan does not fit.

    Raises:
      ValueError: a size is below 1, the tokens don't fit the cache or the model's context, a policy needs a gate that the model
        has not or leaves none of its layers sparse, or the model can't be split by the mesh.
    """
    for name, size in (("batch", batch), ("prompt_width", prompt_width)):
        whole_number(name, size)
    request = Request.of(model, **settings)
    sizes = request.sizes(model, prompt_width, prompt_width)

    def make_job() -> _Job:
        keys = row_keys(jax.random.key(0), batch) if isinstance(request.sampling, Sample) else None
        prompts = jnp.zeros((batch, sizes.width), jnp.int32), jnp.zeros(batch, jnp.int32)
        return _Job.of(model, request, *prompts, keys, sizes)

    job = jax.eval_shape(make_job)
    if mesh is not None:
        model, job = _planned_part(model, job, _layout_of(model, mesh))
    call = _abstract_call(model, job)
    plan = _compiled_plan(*call, streamed) if compiled else _plan_of_shapes(*call)
    return plan.on(available_memory(model)) if available is None else dataclasses.replace(plan, available=available)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Job:
    """A checked request. Fields that change shapes are static.

    Attributes:
      until: new tokens that are asked for, at most `max_new_tokens`.
      eos: with `request.NO_TOKEN` after the last one.
      max_new_tokens, capacity, chunk: see `ProgramSizes`.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    lengths: Int[Array | np.ndarray, "B"]
    keys: Key[Array, "B"] | None
    until: Int[Array | np.ndarray, ""]
    eos: Int[Array | np.ndarray, "E"]
    prefill: Policy
    decode: Policy
    sampling: Sampling
    max_new_tokens: int = dataclasses.field(metadata=dict(static=True))
    capacity: int = dataclasses.field(metadata=dict(static=True))
    chunk: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def of(
        cls,
        model: Transformer,
        request: Request,
        tokens: Int[Array | np.ndarray, "B T"],
        lengths: Int[Array | np.ndarray, "B"],
        keys: Key[Array, "B"] | None,
        sizes: ProgramSizes,
    ) -> "_Job":
        """A request, which names its policies, with its prompts."""
        assert request.prefill is not None and request.decode is not None
        rows, config = len(lengths), model.config
        prompts = Lists(
            rows, tuple(sorted({1, config.num_kv_heads, config.num_heads})), sizes.asked_width, per_row=True
        )
        cached = Lists(rows, (config.num_kv_heads,), sizes.asked_capacity, per_row=False)
        return cls(
            tokens,
            lengths,
            keys,
            until=np.asarray(request.max_new_tokens, np.int32),
            eos=request.end_tokens(model),
            prefill=request.prefill.padded(prompts, sizes.width),
            decode=request.decode if sizes.new_tokens == 1 else request.decode.padded(cached, sizes.capacity),
            sampling=request.sampling,
            max_new_tokens=sizes.new_tokens,
            capacity=sizes.capacity,
            chunk=sizes.chunk,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where a generation stands.

    Attributes:
      cache: of what was fed; a row that has ended keeps its length, so that its further steps overwrite one free slot.
      tokens, lengths, prefill_kept, decode_kept_steps: as in `Generated`.
      step: new tokens so far, of the rows that go on.
      ended: rows that are complete.
      failed: the step at which a row's logits were not finite, or -1.
    """

    cache: Cache | None
    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    prefill_kept: Float[Array, "L B"]
    decode_kept_steps: Float[Array, "N-1 L B"]
    step: Int[Array, ""]
    ended: Bool[Array, "B"]
    failed: Int[Array, "B"]


def _begin(model: Transformer, job: _Job) -> _State:
    """Reads the prompts and draws the first token of each row."""
    cache = _empty_cache(model, job)
    logits, cache, kept = model.prefill(job.tokens, job.lengths, cache, sparsity=job.prefill, chunk=job.chunk)
    return _first_token(model, job, logits, cache.without_prefill_gate_keys(), kept)


def _first_token(
    model: Transformer, job: _Job, logits: Float[Array, "B V"], cache: Cache, kept: Float[Array, "L B"]
) -> _State:
    """The state with the first token of each row, from what `Transformer.prefill` returns."""
    batch = job.lengths.shape[0]
    filler = jnp.maximum(job.eos[0], 0)
    state = _State(
        cache=cache,
        tokens=jnp.full((batch, job.max_new_tokens), filler, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        prefill_kept=kept,
        decode_kept_steps=jnp.zeros((job.max_new_tokens - 1, model.config.num_layers, batch), jnp.float32),
        step=jnp.int32(0),
        ended=jnp.zeros(batch, bool),
        failed=jnp.full(batch, -1, jnp.int32),
    )
    return _draw(job, state, logits)


def _empty_cache(model: Transformer, job: _Job) -> Cache:
    # The gate's part of the cache costs time at every step: leave it out where it is not read.
    gate = model.decode_gate.config if job.decode.needs_gate and model.decode_gate is not None else None
    prefill_gate = model.prefill_gate if job.chunk is not None and job.prefill.needs_gate else None
    kept = None if prefill_gate is None else prefill_gate.config
    return model.empty_cache(job.lengths.shape[0], job.capacity, gate, kept)


def _advance(model: Transformer, job: _Job, state: _State, until: int | Int[Array | np.ndarray, ""]) -> _State:
    """Decodes until there are `until` tokens in the rows that go on, or none does."""
    if job.max_new_tokens == 1:  # it came with the prompt
        return state

    def step(state: _State) -> _State:
        assert state.cache is not None
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1, keepdims=False)
        logits, cache, kept = model.decode(last, state.cache, sparsity=job.decode)
        cache = cache.with_lengths(jnp.where(state.ended, state.cache.lengths, cache.lengths))
        drawn = _draw(job, dataclasses.replace(state, cache=cache), logits)
        made = drawn.lengths > state.lengths  # not by rows that have ended, nor by those that fail here
        kept_steps = state.decode_kept_steps.at[state.step - 1].set(jnp.where(made[None], kept, 0.0))
        return dataclasses.replace(drawn, decode_kept_steps=kept_steps)

    return jax.lax.while_loop(lambda state: (state.step < until) & ~state.ended.all(), step, state)


def _draw(job: _Job, state: _State, logits: Float[Array, "B V"]) -> _State:
    """Appends one token to each row that goes on."""
    keys = None if job.keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(job.keys, state.step)
    drawn = job.sampling.sample(logits, keys)
    broken = ~jnp.isfinite(logits).all(axis=-1) & ~state.ended
    idle = state.ended | broken
    column = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=1, keepdims=False)
    tokens = state.tokens.at[:, state.step].set(jnp.where(idle, column, drawn))
    is_end = (drawn[:, None] == job.eos[None]).any(axis=-1)
    return dataclasses.replace(
        state,
        tokens=tokens,
        lengths=state.lengths + ~idle,
        step=state.step + 1,
        ended=idle | is_end,
        failed=jnp.where(broken, state.step, state.failed),
    )


@jax.jit
def _run(model: Transformer, job: _Job) -> _State:
    return _to_all(model, dataclasses.replace(_advance(model, job, _begin(model, job), job.until), cache=None))


@functools.partial(jax.jit, donate_argnames="cache")
def _resume(model: Transformer, job: _Job, cache: Cache, start: Int[Array | np.ndarray, ""]) -> _State:
    """As `_start`, behind the first `start` tokens, which the cache has; it goes on to keep the prefill gate's keys."""
    assert job.chunk is not None
    tokens, lengths = job.tokens, job.lengths
    read = model.extend(tokens, lengths, cache, start=start, sparsity=job.prefill, chunk=job.chunk)
    logits, cache, kept = read
    return _to_all(model, _first_token(model, job, logits, cache, kept))


@jax.jit
def _start(model: Transformer, job: _Job) -> _State:
    return _to_all(model, _begin(model, job))


@functools.partial(jax.jit, donate_argnames="state")
def _continue(model: Transformer, job: _Job, state: _State, until: int | Int[Array | np.ndarray, ""]) -> _State:
    return _to_all(model, _advance(model, job, state, until))


def _to_all(model: Transformer, state: _State) -> _State:
    """The state with everything but the cache on each device of the model's mesh, so that any host can read it."""
    if model.layout is None:
        return state
    small = model.layout.replicated(dataclasses.replace(state, cache=None))
    return dataclasses.replace(small, cache=state.cache)


def _result(job: _Job, state: _State) -> Generated:
    """What was asked for of the program's arrays."""
    _check_finite(np.asarray(state.failed), np.asarray(state.lengths))
    new = int(job.until)
    tokens, steps = _first(state.tokens, 1, new), _first(state.decode_kept_steps, 0, new - 1)
    return Generated(tokens, state.lengths, state.prefill_kept, steps, state.failed)


def _first(x: Array, axis: int, size: int) -> Array:
    """The first entries along an axis; cut on the host, as the device would compile a program for each size."""
    if x.shape[axis] == size:
        return x
    host = np.asarray(x)[:, :size] if axis else np.asarray(x)[:size]
    return jax.device_put(host, x.sharding if x.committed else None)


def _check_memory(model: Transformer, job: _Job, *, streamed: bool = False, compiled: bool = True) -> None:
    """Raises MemoryError where the device tells that there is too little for weights and cache, or for the program."""
    available = available_memory(model)
    if available is None:
        return
    call = _abstract_call(model, job)
    # First without the program: compiling takes long, and is not for what can't run anyway.
    _plan_of_shapes(*call).on(available).check()
    if compiled:
        _compiled_plan(*call, streamed).on(available).check()


def _abstract_call(model: Transformer, job: _Job) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """By what programs and plans are kept: structure and leaves of `(model, job)`."""
    leaves, structure = jax.tree.flatten((model, job))
    return structure, tuple(map(abstract_argument, leaves))


def _layout_of(model: Transformer, mesh: str | Mesh | AbstractMesh) -> Layout:
    """How a model would lie on a mesh."""
    if model.layout is not None:
        raise ValueError(
            f"mesh must be left out for a model that lies on one, {dict(model.layout.mesh.shape)}; got {mesh}. Load the model without a mesh."
        )
    return Layout.of(make_abstract_mesh(mesh) if isinstance(mesh, str) else mesh, model.config)


def _planned_part(model: Transformer, job: _Job, layout: Layout) -> tuple[Transformer, _Job]:
    """What one device of a mesh has of a model and a job, of shapes."""
    config, rows = model.config, layout.rows(job.lengths.shape[0])

    def of_policy(policy: Policy, heads: int) -> Policy:
        stacked = jax.eval_shape(lambda policy: policy.stacked(config.num_layers, heads), policy)
        return planned_policy(layout, rows, stacked)

    part = dataclasses.replace(
        job,
        tokens=planned_rows(layout, rows, job.tokens),
        lengths=planned_rows(layout, rows, job.lengths),
        keys=planned_rows(layout, rows, job.keys),
        prefill=of_policy(job.prefill, config.num_heads),
        decode=of_policy(job.decode, config.num_kv_heads),
    )
    return planned_model(model, layout, rows), part


@functools.lru_cache(maxsize=256)
def _plan_of_shapes(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> MemoryPlan:
    model, job = jax.tree.unflatten(structure, leaves)
    if model.layout is not None:
        model, job = _planned_part(model, job, model.layout)
    gates = tree_bytes((model.prefill_gate, model.decode_gate))
    cache = jax.eval_shape(functools.partial(_empty_cache, model, job))
    return MemoryPlan(
        weights=tree_bytes(model) - gates,
        gates=gates,
        cache=tree_bytes(cache.token_arrays),
        gate_cache=tree_bytes(cache.gate_arrays),
        devices=1 if model.shard is None else model.shard.layout.mesh.size,
    )


@functools.lru_cache(maxsize=256)
def _compiled_plan(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], streamed: bool) -> MemoryPlan:
    """With scratch where the compiler tells it. JAX keeps what it compiles here: the call itself does not compile again."""
    plan = _plan_of_shapes(structure, leaves)
    model, job = jax.tree.unflatten(structure, leaves)
    made = _bytes_of_stream(model, job) if streamed else laid_out_bytes(_run.lower(model, job).compile())
    scratch = None if made is None else max(made - plan.cache - plan.gate_cache, 0)
    return dataclasses.replace(plan, scratch=scratch)


def _bytes_of_stream(model: Transformer, job: _Job) -> int | None:
    """What the two programs of `stream` take besides the model, cache included: the larger of both."""
    start = _start.lower(model, job).compile()
    first = laid_out_bytes(start)
    if first is None or job.max_new_tokens == 1:
        return first
    state = jax.eval_shape(_begin, model, job)
    if any(x.sharding is not None for x in jax.tree.leaves((model, job))):  # then results stay where arguments were put
        state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, start.output_shardings)
    rest = laid_out_bytes(_continue.lower(model, job, state, 0).compile())
    return None if rest is None else max(first, device_bytes(state) + rest)


def _make_job(model: Transformer, tokens: Prompts, lengths: Lengths | None, request: Request) -> _Job:
    prompts, counts = check_prompts(tokens, lengths, vocab_size=model.config.vocab_size)
    request.require_key()
    sizes = request.sizes(model, prompts.shape[1], int(counts.max()))
    check_weights(model)
    prompts = np.pad(prompts, ((0, 0), (0, sizes.width - prompts.shape[1])))
    # Without keys where none is used: the program is that of the plan then, and of calls without a key.
    key = None if isinstance(request.sampling, Greedy) else request.key
    keys = None if key is None else row_keys(key, len(counts))
    return _Job.of(model, request, prompts, counts, keys, sizes)


def _check_finite(failed: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"]) -> None:
    """Tells which rows ended because of their logits: by an error where nothing was made, otherwise by a warning."""
    rows = np.flatnonzero(failed >= 0)
    if not len(rows):
        return
    what = (
        f"Logits must be finite; those of row {rows[0]} at new token {failed[rows[0]]} hold NaN or infinity "
        f"(rows affected: {rows.tolist()}). "
    )
    remedy = (
        "The weights are damaged, or activations overflow their dtype; load the model anew, or with dtype=jnp.float32."
    )
    if not lengths.any():
        raise ValueError(what + remedy)
    warnings.warn(f"{what}These rows end there, the others are complete. {remedy}", RuntimeWarning, stacklevel=3)

"""Generation with prompts that are read in chunks: its results, its programs, its memory, and when prompts are cut."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import assume_hopper
from seer_jax import Generated, Transformer, generate, plan_memory, stream
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction
from seer_jax.inference.request import Request
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS
from tests.seer_jax.conftest import LLAMA, tiny_model

quickly = pytest.mark.usefixtures("compile_quickly")
LENGTHS = np.array([7, 16, 70, 33], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 63, (4, 70)).astype(np.int32)
SPARSE: dict[str, Any] = dict(prefill=TopK(0.3), decode=TokenBudget(32), eos=())


@functools.cache
def llama() -> Transformer:
    return tiny_model()


def run(model: Transformer | None = None, tokens: np.ndarray = TOKENS, **changes: Any) -> Generated:
    lengths = np.minimum(LENGTHS, tokens.shape[1])
    settings: dict[str, Any] = SPARSE | dict(max_new_tokens=6) | changes
    return generate(model or llama(), tokens, lengths, **settings)


@pytest.mark.slow
@quickly
@pytest.mark.parametrize("given", [False, True], ids=["gates", "given"])
def test_tokens_are_those_of_whole_prompts(given: bool):
    policies: dict[str, Any] = {}
    if given:  # masks cover the prompts, whatever room programs have
        rng = np.random.default_rng(1)
        policies["prefill"] = Given(rng.random((2, 4, 4, 5, 5)) < 0.5, 16)
        policies["decode"] = Given(rng.random((2, 4, 2, 5)) < 0.5, 16)
    whole, chunked = run(prefill_chunk=0, **policies), run(prefill_chunk=32, **policies)
    assert chunked.rows() == whole.rows()
    np.testing.assert_allclose(chunked.prefill_kept, whole.prefill_kept, atol=1e-6)
    np.testing.assert_allclose(chunked.decode_kept_steps, whole.decode_kept_steps, atol=1e-6)
    assert whole.prefill_kept.min() < 1
    if not given:
        pieces = list(stream(llama(), TOKENS, LENGTHS, chunk=4, prefill_chunk=32, max_new_tokens=6, **SPARSE))
        assert [[token for piece in pieces for token in piece[row]] for row in range(4)] == whole.rows()


@quickly
def test_one_program_serves_prompts_of_all_lengths(monkeypatch: pytest.MonkeyPatch):
    traces, prefill = [], Transformer.prefill
    monkeypatch.setattr(Transformer, "prefill", lambda *args, **kwargs: traces.append(1) or prefill(*args, **kwargs))

    def count(width: int, **changes: Any) -> int:
        before = len(traces)
        run(tokens=TOKENS[:, :width], prefill_chunk=16, max_new_tokens=1, **changes)
        return len(traces) - before

    room: dict[str, Any] = dict(cache_capacity=80)
    assert [count(width, **room) for width in (70, 16, 17, 1, 64, 49)] == [1, 0, 0, 0, 0, 0]
    # Without it, room for whole chunks: 5 of them, which are the program of before.
    assert [count(width) for width in (65, 70)] == [0, 0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(prefill_chunk=-1),
            r"prefill_chunk must be an integer of at least 0 \(0: the whole prompt at once\); got -1",
        ),
        (dict(prefill_chunk=64.0), "prefill_chunk must be an integer of at least 0"),
        (dict(prefill_chunk=24), "prefill_chunk must be a multiple of 16 tokens, whole blocks; got 24. Use 32."),
        *(
            (
                dict(prefill_chunk=32, prefill=TopK(0.3, SCORERS[name]())),
                f"got topk:0.3:{name}, which looks at the whole prompt. Use another policy, or `generate` for one prompt without prefill_chunk",
            )
            for name in ("minference", "flexprefill")
        ),
    ],
)
def test_chunks_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_a_cache_must_have_room_for_whole_chunks():
    model = llama()
    with pytest.raises(ValueError, match=r"got 96 tokens \(in whole chunks of 32\) for 80 slots. Make a larger cache"):
        model.prefill(TOKENS, LENGTHS, model.make_cache(4, 80), chunk=32)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [int, np.int32, jnp.int32])
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (-16, "start must be a multiple of 16 tokens, whole blocks, from 0 on; got -16"),
        (24, "start must be a multiple of 16 tokens, whole blocks, from 0 on; got 24"),
        (96, r"got 192 tokens \(in whole chunks of 32\) for 160 slots"),
        (32, "extended under topk:0.3 must keep the prefill gate's keys of what was read; got none. Make it by"),
    ],
)
def test_what_can_not_be_extended_is_refused(start: int, message: str, kind: Any):
    model = llama()
    cache = model.make_cache(4, 160)
    with pytest.raises(ValueError, match=message):
        model.extend(TOKENS, LENGTHS, cache, start=kind(start), sparsity=TopK(0.3), chunk=32)


@pytest.mark.usefixtures("unchecked")
def test_a_place_that_is_not_known_needs_the_gates_keys():
    """It may be behind tokens whose keys of the gate were not kept: their scores would be those of zeros."""
    model = llama()

    def extend(start: Any) -> Any:
        return model.extend(TOKENS, LENGTHS, model.make_cache(4, 160), start=start, sparsity=TopK(0.3), chunk=32)

    with pytest.raises(ValueError, match="must keep the prefill gate's keys of what was read; got none"):
        jax.eval_shape(extend, jnp.int32(0))


@pytest.mark.parametrize(
    ("policy", "width", "setting", "chunk"),
    [
        (TopK(0.1), 32768, None, None),
        (TopK(0.1), 32769, None, 8192),
        (Dense(), 200_000, None, 8192),
        (TopK(0.1, SCORERS["flexprefill"]()), 200_000, None, None),
        (TopK(0.1), 200_000, 0, None),
        (TopK(0.1), 10, 4096, 4096),
    ],
    ids=str,
)
def test_long_prompts_are_cut(policy: Policy, width: int, setting: int | None, chunk: int | None):
    request = Request.of(llama(), max_new_tokens=1, prefill=policy, prefill_chunk=setting, beyond_context=True)
    sizes = request.sizes(llama(), width, width)
    assert sizes.chunk == chunk
    assert chunk is None or (sizes.width == sizes.capacity and sizes.capacity % chunk == 0)
    assert width <= sizes.capacity <= max(1.25 * width, chunk or 0)


LONG = dataclasses.replace(
    LLAMA, hidden_size=512, intermediate_size=1024, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64
)


@functools.cache
def long_model(dtype: str = "float32", *, finer: bool = False) -> Transformer:
    """Of shapes."""
    prefill, decode = PrefillGateConfig(64, 64), DecodeGateConfig(64, 64)
    if finer:
        prefill = dataclasses.replace(prefill, q_pool_size=16, k_pool_size=8)
        decode = dataclasses.replace(decode, query_reduction=QueryReduction.HEADS, k_pool_size=8)

    def build() -> Transformer:
        model = Transformer(LONG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        return model.add_gate(prefill, rngs=nnx.Rngs(1)).add_gate(decode, rngs=nnx.Rngs(2))

    return nnx.eval_shape(build)


@pytest.mark.cpu
@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize(
    "policy",
    [TopK(0.1), *(pytest.param(x, marks=pytest.mark.slow) for x in (Dense(), Threshold(1e-3, skip=1e-3)))],
    ids=str,
)
def test_memory_does_not_grow_with_the_prompt(policy: Policy):
    """Besides the cache, whose part are the keys of the gates."""
    sizes: dict[str, Any] = dict(max_new_tokens=1, prefill=policy, prefill_chunk=8192, beyond_context=True)
    short, long = (plan_memory(long_model(), 1, n, cache_capacity=n, available=2**40, **sizes) for n in (65536, 131072))
    assert long.cache == 2 * short.cache and (long.gate_cache > 0) == policy.needs_gate
    assert short.scratch is not None and long.scratch is not None
    assert long.scratch < 1.1 * short.scratch
    sizes["prefill_chunk"] = 0
    whole = plan_memory(long_model(), 1, 131072, cache_capacity=131072, compiled=False, **sizes)
    keys = 4 * 131072 // 64 * 8 * 64 * 4  # of the prefill gate: L Sw H C in float32
    assert long.gate_cache - whole.gate_cache == keys * policy.needs_gate


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("finer", [False, True], ids=["release", "finer"])
def test_programs_of_long_prompts_are_lowered_for_hopper(finer: bool):
    """More tokens than a warp of the kernel of lists holds blocks of: they are chosen among 5120."""
    capacity, chunk = 40 * 8192, 8192
    policies = (CumulativeMass(0.9), CumulativeMass(0.9)) if finer else (TopK(0.1), TokenBudget(2048))

    def program(model: Transformer, tokens: jax.Array) -> jax.Array:
        prefill, decode = model.prefill_gate, model.decode_gate
        assert prefill is not None and decode is not None
        cache = model.empty_cache(1, capacity, decode.config, prefill.config)
        logits, cache, _ = model.prefill(tokens, None, cache, sparsity=policies[0], chunk=chunk)
        return model.decode(logits.argmax(axis=-1), cache, sparsity=policies[1])[0]

    with assume_hopper():
        traced = jax.jit(program).trace(
            long_model("bfloat16", finer=finer), jnp.zeros((1, capacity - chunk), jnp.int32)
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 5  # lists and attention of both phases, and scores of the first

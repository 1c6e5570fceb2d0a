"""Measurements: the clock, the work that is counted, what counts as wrong, and the file."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench as measurements
from pallas_kernels import block_sparse_attention
from pallas_kernels import cases as shapes
from pallas_kernels.backends import Unsupported
from pallas_kernels.bench import (
    GIB,
    MOVED_BYTES,
    MOVES,
    Measurement,
    Timing,
    guarded,
    layers_beyond_cache,
    memory_rate,
    time_calls,
    time_chain,
    too_large,
    variants,
    write_report,
)
from pallas_kernels.block_sparse_attention import bench, xla
from pallas_kernels.block_sparse_attention.bench import Bench, listed_flops, odd_cases, sweep
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.block_sparse_attention.sampled_check import find_fault, sampled_errors
from pallas_kernels.cases import Heads, large_random_array
from tests.pallas_kernels.comparison import KEY, listed_blocks

HEADS = Heads(4, 2, 64)
RAGGED = Case("ragged", HEADS, 128, batch=2, density=0.5, lengths=(128, 70))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[..., Any]]]:
    """Every call takes 2 ms; the list holds the functions that were timed."""
    timed: list[Callable[..., Any]] = []

    def fixed(function: Callable[..., Any], *_: Any) -> Timing:
        timed.append(function)
        return Timing(2.0, 0.1, 3)

    monkeypatch.setattr(bench, "time_calls", fixed)
    yield timed


def test_the_clock_counts_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurements, "WARM_UP", 0.01)
    calls = []

    def slow() -> jax.Array:
        calls.append(1)
        time.sleep(0.005)
        return jnp.ones(())

    timing = time_calls(slow, seconds=0.02, repetitions=3)
    assert timing.milliseconds >= 5 and 1 <= timing.calls <= 4 and timing.spread >= 0
    assert len(calls) >= 2 + 3 * timing.calls


def test_calls_of_a_chain_take_what_the_one_before_gave():
    def step(state: jax.Array, shared: jax.Array, operand: jax.Array, number: int) -> jax.Array:
        return 10 * state + operand + number * shared

    operands = [jnp.asarray(1), jnp.asarray(2)]
    seen = []

    def fixed(function: Callable[..., Any], *arguments: Any) -> Timing:
        seen.append(int(function(*arguments)))
        return Timing(12.0, 0.1, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "time_calls", fixed)
        timing = time_chain(step, jnp.asarray(0), jnp.asarray(5), operands, seconds=1e-3)
    calls = timing.calls // 3
    assert timing.milliseconds == 12 / calls and calls % 2 == 0
    expected = 0
    for number in range(calls):
        expected = 10 * expected + int(operands[number % 2]) + number % 2 * 5
    assert seen == [expected]


@pytest.mark.parametrize(("reading", "copying", "moved"), [(2.0, 5.0, 1), (2.0, 3.0, 4 / 3)])
def test_the_rate_of_the_memory_is_that_of_a_sum_or_a_copy(
    monkeypatch: pytest.MonkeyPatch, reading: float, copying: float, moved: float
):
    times = iter((reading, copying))

    def fixed(run, *arguments):
        for _ in range(2):
            jax.block_until_ready(run(*arguments))
        return Timing(next(times), 0.1, 1)

    monkeypatch.setattr(measurements, "time_calls", fixed)
    size = MOVED_BYTES if jax.default_backend() == "gpu" else MOVED_BYTES // 128
    assert memory_rate.__wrapped__() == pytest.approx(moved * size * MOVES / 2e-3)


def test_layers_take_turns_until_the_cache_has_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [layers_beyond_cache(x, 2**25) for x in (2e8, 1e8, 3.3e6, 1e3)] == [1, 2, 61, 64]
    assert [layers_beyond_cache(3.3e6, size) for size in (2**30, 2**33, 2**36)] == [16, 2, 1]


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurements, "memory_limit", lambda: 10 * GIB)
    assert too_large(9 * GIB) is None
    assert "needs 9.5 GiB; 90% of the 10.0 GiB that JAX may use here are 9.0" in (too_large(9.5 * GIB) or "")
    monkeypatch.setattr(measurements, "memory_limit", lambda: None)
    assert too_large(1e15) is None


def test_a_large_array_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shapes, "ELEMENTS_AT_ONCE", 1000)
    key = jax.random.key(0, impl="rbg")
    array = np.asarray(large_random_array(key, (7, 30, 16), "bfloat16", 2.0), np.float32)
    assert abs(array.std() / 2 - 1) < 0.05 and abs(array.mean()) < 0.1
    assert len(np.unique(array.reshape(-1, 16), axis=0)) == 7 * 30


def arguments_of(case: Case) -> dict[str, Any]:
    arguments = case.arguments(KEY)
    arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
    return arguments


@pytest.mark.parametrize(
    "case",
    [
        Case("own", HEADS, 200, density=0.5),
        Case("shared", HEADS, 200, density=0.5, lists=2),
        Case("large", HEADS, 300, density=0.5, lists=1, block_size=128),
        RAGGED,
        Case("chunk", HEADS, 64, 256, density=0.5, query_offset=192),
    ],
    ids=lambda case: case.name,
)
def test_flops_are_those_of_listed_blocks(case: Case):
    """4 b^2 D for each pair of a query head and a block on its list; rows beyond a sequence count nothing."""
    arguments = arguments_of(case)
    q, k, blocks = arguments["q"], arguments["k"], arguments["blocks"]
    listed = listed_blocks(blocks, -(-k.shape[1] // case.block_size))
    count = 0
    for i, h in np.ndindex(len(q), q.shape[2]):
        rows = -(-max(0, int(arguments["lengths"][i]) - int(arguments["query_offset"])) // case.block_size)
        count += listed[i, h * listed.shape[1] // q.shape[2], :rows].sum()
    assert listed_flops(arguments) == 4 * case.block_size**2 * HEADS.head_dim * count


def test_a_right_result_has_no_fault():
    for case in (RAGGED, Case("bf16", HEADS, 200, density=0.3), Case("f32", HEADS, 200, density=0.3, dtype="float32")):
        arguments = arguments_of(case)
        result = block_sparse_attention(**arguments, return_lse=True)
        errors = sampled_errors(KEY, arguments, *result)
        assert find_fault(errors, arguments, result, result) is None
        assert 0 < errors.out < 3e-3 and errors.lse < 1e-5


FAULTS = [
    (lambda out, lse: (out * 1.01, lse), "the output errs by"),
    (lambda out, lse: (out, lse + 2e-4), "lse errs by 2"),
    (lambda out, lse: (out.at[0, 3].set(jnp.nan), lse), "all others finite"),
    (lambda out, lse: (out, lse.at[0, 3].set(-jnp.inf)), "all others finite"),
    (lambda out, lse: (out.at[1, 71, 0, 0].set(1e-9), lse), "must give 0"),
    (lambda out, lse: (out, lse.at[1, 71, 0].set(0)), "lse -inf"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_wrong_result_is_found(change: Callable, message: str):
    arguments = arguments_of(RAGGED)
    result = change(*block_sparse_attention(**arguments, return_lse=True))
    fault = find_fault(sampled_errors(KEY, arguments, *result), arguments, result, result)
    assert fault is not None and message in fault


def test_a_block_left_out_is_found():
    """By lse at the latest, in a row of all 32 blocks."""
    case = Case("whole", HEADS, 2048, density=1.0)
    arguments = arguments_of(case)
    blocks = arguments["blocks"]
    fewer = dataclasses.replace(blocks, counts=jnp.maximum(blocks.counts - 1, 1))
    result = block_sparse_attention(**arguments | {"blocks": fewer}, return_lse=True)
    assert find_fault(sampled_errors(KEY, arguments, *result), arguments, result, result) is not None


def test_two_runs_that_differ_are_found():
    arguments = arguments_of(RAGGED)
    out, lse = block_sparse_attention(**arguments, return_lse=True)
    other = out.at[0, 5, 1, 7].multiply(1.01)
    errors = sampled_errors(KEY, arguments, out, lse)
    assert find_fault(errors, arguments, (out, lse), (other, lse)) == "two runs on the same arrays differ"


@pytest.mark.slow
def test_a_sweep_times_dense_attention_once_per_shape(clock: list[Callable[..., Any]]):
    lines = list(Bench("xla").sweep(sweep(HEADS, (64,), (0.5, 1.0))))
    assert len(lines) == 6 and len(clock) == 6 + 1
    assert {m.results["density"] for m in lines if m.settings["density"] == 1} == {1.0}
    first = lines[0]
    assert first.case == "64, 64x64, own, 0.5" and first.failure is None
    assert first.results["speedup"] == 1
    assert first.results["effective_tflops"] == pytest.approx(4 * 64 * 64 * 64 * 4 / 2e-3 / 1e12)
    assert first.settings["implementation"] == "xla" and first.settings["config"] is None


@pytest.mark.slow
def test_odd_cases_stand_beside_aligned_ones(clock: list[Callable[..., Any]]):
    unaligned, ragged, *_, chunk = odd_cases(HEADS, 256)
    pairs = [unaligned, ragged, chunk]
    lines = list(Bench().pairs(pairs))
    assert [m.case for m in lines] == [odd.name for odd, _ in pairs]
    for m in lines:
        assert m.failure is None
        ours, aligned = m.results["effective_tflops"], m.results["aligned_tflops"]
        assert ours and aligned and m.results["share_of_aligned"] == ours / aligned
    assert lines[-1].results["speedup"] is None and "no query offset" in (lines[-1].note or "")


def test_a_wrong_result_is_not_timed(clock: list[Callable[..., Any]], monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: Any) -> Callable[..., Any]:
        def run(**arguments: Any) -> Any:
            out, lse = block_sparse_attention(**arguments, return_lse=True)
            return out * 1.05, lse

        return run

    monkeypatch.setattr(bench, "compiled", wrong)
    (line,) = Bench().sweep([RAGGED])
    assert "the output errs by" in (line.failure or "")
    assert "milliseconds" not in line.results and not clock


def test_every_variant_of_an_implementation(clock: list[Callable[..., Any]], monkeypatch: pytest.MonkeyPatch):
    assert variants(bench.PACKAGE, "xla") == variants(bench.PACKAGE, None) == {}
    plain, seen = xla.block_sparse_attention, []

    def with_config(*arguments: Any, config: str, **numbers: Any) -> Any:
        seen.append(config)
        return plain(*arguments, **numbers)

    monkeypatch.setattr(xla, "CONFIGS", {"wide": "w", "deep": "d"}, raising=False)
    monkeypatch.setattr(xla, "block_sparse_attention", with_config)
    for choice in variants(bench.PACKAGE, "xla").items():
        (line,) = Bench("xla", choice).sweep([RAGGED])
        assert line.failure is None and line.settings["config"] == choice[0]
    assert seen == ["w", "d"]


def test_what_cannot_be_had_says_why():
    blank = Measurement("attention", "case", {})

    def fail(error: Exception) -> Callable[[], Measurement]:
        def measure() -> Measurement:
            raise error

        return measure

    assert guarded(fail(Unsupported("no such device\nmore")), blank) == dataclasses.replace(
        blank, note="no such device"
    )
    needed = guarded(fail(Unsupported("no such device")), blank, required=True)
    assert needed.failure == "no such device" and needed.note is None
    broken = guarded(fail(jax.errors.JaxRuntimeError("out of memory")), blank)
    assert broken.failure == "out of memory" and broken.note is None
    full = fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"))
    assert guarded(full, blank).failure and guarded(full, blank, must_fit=False).note == "RESOURCE_EXHAUSTED: no memory"
    assert guarded(fail(jax.errors.JaxRuntimeError("broken")), blank, must_fit=False).failure == "broken"
    with pytest.raises(KeyError):
        guarded(fail(KeyError("a defect shows")), blank)


def test_the_report_holds_what_is_needed_to_repeat_it(tmp_path: Path):
    lines = [Measurement("attention", "a", dict(length=64), dict(milliseconds=1.5, error=math.nan), None, "wrong")]
    path = tmp_path / "new" / "bench.json"
    write_report(path, lines, command=["seer-jax", "bench", "prefill"])
    report = json.loads(path.read_text())
    assert report["device"] == jax.devices()[0].device_kind and report["command"] == "seer-jax bench prefill"
    assert report["versions"]["jax"] == jax.__version__ and report["date"].startswith("20")
    assert report["measurements"] == [
        dict(table="attention", case="a", settings=dict(length=64), results=dict(milliseconds=1.5, error=None), note=None,
             failure="wrong")
    ]  # fmt: skip

"""The harness of measurements: the clock, the check of results, notes and failures, the file, tables and plots."""

import dataclasses
import functools
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from pallas_kernels import AttentionWithScores, attention_with_block_scores, block_sparse_attention
from pallas_kernels.backends import Unsupported
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.cases import Heads
from pallas_kernels.devices import default_device
from seer_jax.bench.configs import PrefillBench
from seer_jax.bench.decode import PANELS as DECODE_PANELS
from seer_jax.bench.harness import clock, measurement
from seer_jax.bench.harness.clock import (
    Timing,
    layers_beyond_cache,
    memory_rate,
    time_calls,
    time_carried,
    time_chain,
    time_in_turns,
)
from seer_jax.bench.harness.measurement import Measurement, Outcome, beside_dense, measure, write_json
from seer_jax.bench.harness.plots import plot_panels
from seer_jax.bench.harness.report import print_tables, report
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.bench.prefill import FIRST_TOKEN
from seer_jax.bench.prefill import PANELS as PREFILL_PANELS
from seer_jax.inference.memory import GIB, DeviceMemory
from tests.pallas_kernels.suites.comparison import slow_but

pytestmark = pytest.mark.usefixtures("compile_quickly")
KEY = jax.random.key(0)
HEADS = Heads(4, 2, 64)
RAGGED = Case("ragged", HEADS, 128, batch=2, density=0.5, lengths=(128, 70))


def test_the_clock_counts_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clock, "WARM_UP", 0.01)
    calls = []

    def slow() -> jax.Array:
        calls.append(1)
        time.sleep(0.005)
        return jnp.ones(())

    timing = time_calls(slow, seconds=0.02, repetitions=3)
    assert timing.milliseconds >= 5 and timing.spread >= 0 and len(calls) >= 2 + 3


@pytest.mark.parametrize(("seconds", "calls", "expected"), [(2e-3, 1, 4), (2e-2, 10, 4), (1e-3, 1, 4)])
def test_functions_are_timed_in_turns(seconds: float, calls: int, expected: int, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int]] = []

    def fixed(function: Callable[[], str], arguments: Any, count: int) -> float:
        asked.append((function(), count))
        return count * 2e-3

    monkeypatch.setattr(clock, "_run", fixed)
    times = time_in_turns([lambda: "a", lambda: "b"], seconds=seconds, repetitions=expected)
    assert times == [pytest.approx([2.0] * expected)] * 2
    turns = [("a", 1), ("b", 1)], [("b", calls), ("a", calls)], [("a", calls), ("b", calls)]
    assert asked == [*turns[0], *turns[1], *turns[2], *turns[1], *turns[2]]
    monkeypatch.setattr(clock, "LONG", 1e-3)  # then the first calls count, and two more are enough
    assert time_in_turns([lambda: "a"], seconds=seconds) == [pytest.approx([2.0] * 3)]


def test_calls_of_a_chain_take_what_the_one_before_gave(two_milliseconds: list[Callable[..., Any]]):
    seen = []

    def step(state: jax.Array, shared: jax.Array, operand: jax.Array, number: int) -> jax.Array:
        state = 10 * state + operand + number * shared
        jax.debug.callback(lambda x: seen.append(int(x)), state, ordered=True)
        return state

    timing = time_chain(step, jnp.asarray(0), jnp.asarray(5), [jnp.asarray(1), jnp.asarray(2)], seconds=1e-3)
    jax.effects_barrier()
    calls = round(2 / timing.milliseconds)
    assert len(seen) == calls and calls % 2 == 0 and seen[:2] == [1, 17]


def test_each_call_gets_what_the_one_before_carried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clock, "WARM_UP", 0.0)
    add = jax.jit(lambda carried, step: (carried + step, carried), donate_argnums=0)
    _, last = time_carried(add, jnp.asarray(0), jnp.asarray(3))
    assert last >= 6 and last % 3 == 0


@pytest.mark.parametrize(("reading", "copying", "moved"), [(2.0, 5.0, 1), (2.0, 3.0, 4 / 3)])
def test_the_rate_of_the_memory_is_that_of_a_sum_or_a_copy(
    monkeypatch: pytest.MonkeyPatch, reading: float, copying: float, moved: float
):
    times = iter((reading, copying))

    def fixed(run: Callable[..., Any], *arguments: Any) -> Timing:
        for _ in range(2):
            jax.block_until_ready(run(*arguments))
        return Timing(next(times), 0.1)

    monkeypatch.setattr(clock, "time_calls", fixed)
    device = default_device()
    size = clock.MOVED_BYTES if device.platform == "gpu" else clock.MOVED_BYTES // 128
    assert memory_rate.__wrapped__(device) == pytest.approx(moved * size * clock.MOVES / 2e-3)


def test_layers_take_turns_until_the_cache_has_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clock, "default_device", lambda: SimpleNamespace(platform="gpu"))
    assert [layers_beyond_cache(x, 2**25) for x in (2e8, 1e8, 3.3e6, 1e3)] == [1, 2, 61, 64]
    assert [layers_beyond_cache(3.3e6, size) for size in (2**30, 2**33, 2**36)] == [16, 2, 1]


def call_of(case: Case) -> AttentionCall:
    arguments = case.arguments(KEY)
    arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
    return AttentionCall(**arguments)


def result_of(call: AttentionCall) -> AttentionWithScores:
    out, lse = block_sparse_attention(**call._asdict(), return_lse=True)
    return AttentionWithScores(out, lse, None, None)


@pytest.mark.parametrize(
    "case",
    slow_but(
        [
            RAGGED,
            Case("shared lists", HEADS, 200, density=0.3, lists=2),
            Case("f32", HEADS, 200, density=0.3, dtype="float32"),
            Case("chunk", HEADS, 77, 205, density=0.5, query_offset=128, block_size=128),
        ],
        "ragged",
        "chunk",
    ),
    ids=lambda case: case.name,
)
def test_a_right_result_has_no_fault(case: Case):
    call = call_of(case)
    result = result_of(call)
    outcome = check_result(KEY, call, result, result)
    error, lse_error = (outcome.results[name] or 0.0 for name in ("error", "lse_error"))
    assert outcome.failure is None and 0 < error < 3e-3 and lse_error < 1e-5


FAULTS = [
    (lambda out, lse: (out * 1.01, lse), "the output errs by"),
    (lambda out, lse: (out, lse + 2e-4), "lse errs by 2"),
    (lambda out, lse: (out.at[0, 3].set(jnp.nan), lse), "all others finite"),
    (lambda out, lse: (out, lse.at[0, 3].set(-jnp.inf)), "all others finite"),
    (lambda out, lse: (out.at[1, 71, 0, 0].set(1e-9), lse), "must be 0"),
    (lambda out, lse: (out, lse.at[1, 71, 0].set(0)), "-inf for queries"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_wrong_result_is_found(change: Callable, message: str):
    call = call_of(RAGGED)
    out, lse = change(*result_of(call)[:2])
    result = AttentionWithScores(out, lse, None, None)
    assert message in (check_result(KEY, call, result, result).failure or "")


def test_a_block_left_out_is_found():
    """By lse at the latest, in a row of all 32 blocks."""
    call = call_of(Case("whole", HEADS, 2048, density=1.0))
    fewer = dataclasses.replace(call.blocks, counts=jnp.maximum(call.blocks.counts - 1, 1))
    result = result_of(call._replace(blocks=fewer))
    assert check_result(KEY, call, result, result).failure is not None


@pytest.mark.slow
def test_what_is_skipped_wrongly_is_found():
    """By the output, or by the number of blocks that tiles say they kept."""
    case = Case("skips", HEADS, 450, batch=2, density=1.0, lengths=(450, 300), block_size=128, peak=2.0)
    call = call_of(dataclasses.replace(case, skip_threshold=1e-2))
    attend = functools.partial(block_sparse_attention, return_lse=True, return_kept=True)
    (out, lse, kept), (more, more_lse, _) = (attend(**x._asdict()) for x in (call, call._replace(skip_threshold=0.0)))
    result, other = AttentionWithScores(out, lse, None, None), AttentionWithScores(more, more_lse, None, None)
    right = check_result(KEY, call, result, result, kept=(kept, kept))
    assert right.failure is None and right.results["kept_error"] == 0
    assert "errs by" in (check_result(KEY, call, other, other, kept=(kept, kept)).failure or "")
    wrong = check_result(KEY, call, result, result, kept=(kept + 1, kept + 1)).failure
    assert wrong == "a tile's number of blocks that are not skipped errs by 1; 0 is allowed"
    unequal = check_result(KEY, call, result, result, kept=(kept, kept + 1)).failure
    assert unequal == "two runs on the same arrays differ"


def test_two_runs_that_differ_are_found():
    call = call_of(RAGGED)
    first = result_of(call)
    second = first._replace(output=first.output.at[0, 5, 1, 7].multiply(1.01))
    assert check_result(KEY, call, first, second).failure == "two runs on the same arrays differ"


@pytest.mark.parametrize("name", [None, "output", "lse", "block_scores", "token_scores"])
@pytest.mark.parametrize(("offset", "queries", "statistic"), [(0, 150, "mass"), (64, 86, "max")])
def test_wrong_scores_are_found(name: str | None, offset: int, queries: int, statistic: str):
    case = call_of(Case("", HEADS, 150, dtype="float32"))
    q, at = case.q[:, offset : offset + queries], jnp.int32(offset)
    call = AttentionCall.dense(q, case.k, case.v, at, case.lengths)
    asked: dict[str, Any] = dict(token_scores=True, statistic=statistic, query_offset=at)
    result = attention_with_block_scores(q, case.k, case.v, **asked)
    if name is not None:
        result = result._replace(**{name: 1.01 * getattr(result, name)})
    outcome = check_result(KEY, call, result, result, statistic=statistic)
    expected = {None: "", "output": "the output errs by", "lse": "lse errs by"}.get(name, "scores err by")
    assert (outcome.failure or "").startswith(expected) and (name is None) == (outcome.failure is None)
    if name is None:
        assert (outcome.results["scores_error"] or 0.0) < 1e-5


UNABLE, BROKEN, FULL = Unsupported("no such device\nmore"), "broken", "RESOURCE_EXHAUSTED: no memory"


@pytest.mark.parametrize(
    ("error", "limits", "outcome"),
    [
        (UNABLE, {}, dict(note="no such device")),
        (UNABLE, dict(required=True), dict(failure="no such device")),
        (jax.errors.JaxRuntimeError(BROKEN), dict(needed_bytes=0), dict(failure=BROKEN)),
        (jax.errors.JaxRuntimeError(FULL), {}, dict(failure=FULL)),
        (jax.errors.JaxRuntimeError(FULL), dict(needed_bytes=0), dict(note=FULL)),
    ],
)
def test_what_cannot_be_measured_says_why(error: Exception, limits: dict, outcome: dict):
    def run() -> Outcome:
        raise error

    assert measure("attention", "case", {}, run, **limits) == Measurement("attention", "case", {}, **outcome)


def test_a_defect_shows():
    with pytest.raises(KeyError):
        measure("attention", "case", {}, lambda: {}["no such key"])


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement, "device_memory", lambda device: DeviceMemory(10 * GIB, 0))
    assert measure("x", "case", {}, lambda: Outcome({"a": 1.0}), needed_bytes=9 * GIB).results == {"a": 1.0}
    note = measure("x", "8 x 64", {}, lambda: pytest.fail("tried"), needed_bytes=9.5 * GIB).note
    assert "8 x 64 needs 9.5 GiB; 90% of the 10.0 GiB that JAX may use here are 9.0" in (note or "")


def test_the_report_holds_what_is_needed_to_repeat_it(tmp_path: Path):
    lines = [Measurement("attention", "a", dict(length=64), dict(milliseconds=1.5, error=math.nan), None, "wrong")]
    path = tmp_path / "new" / "bench.json"
    write_json(path, lines, command=["seer-jax", "bench", "prefill"])
    report = json.loads(path.read_text())
    assert report["device"] == jax.devices()[0].device_kind and report["command"] == "seer-jax bench prefill"
    assert report["versions"]["jax"] == jax.__version__ and report["date"].startswith("20")
    assert report["measurements"] == [
        dict(table="attention", case="a", settings=dict(length=64), results=dict(milliseconds=1.5, error=None), note=None,
             failure="wrong")
    ]  # fmt: skip


def line(table: str, milliseconds: float, **settings: Any) -> Measurement:
    return Measurement(table, f"{table} case", settings, dict(milliseconds=milliseconds))


def test_a_line_stands_beside_the_dense_one_before_it():
    lines = [line("model", x, density=density) for density, x in ((None, 8.0), (0.1, 2.0), (None, 9.0), (0.1, 3.0))]
    assert [m.results["speedup"] for m in beside_dense(lines)] == [1, 4, 1, 3]
    failed = Measurement("model", "dense", dict(density=None), note="no memory")
    assert [m.results.get("speedup") for m in beside_dense([lines[0], failed, lines[1]])] == [1, None, None]


def test_what_does_not_apply_is_a_dash():
    console = Console(file=io.StringIO(), width=100)
    dense = dataclasses.replace(line("model", 2.0, density=None), note="no memory is told")
    print_tables(console, (FIRST_TOKEN,), list(beside_dense([dense])))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    row = next(x for x in text.splitlines() if x.startswith("model case"))
    assert row.split() == ["model", "case", "-", "2", "1.00", "-", "-", "-"]
    assert "-: no memory is told" in text


def test_an_interrupted_run_shows_and_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def interrupted() -> Iterator[Measurement]:
        yield line("model", 2.0, density=None)
        raise KeyboardInterrupt

    config = PrefillBench(output=tmp_path / "bench.json")
    with pytest.raises(KeyboardInterrupt) as stop:
        report(config, interrupted(), (FIRST_TOKEN,), ())
    assert FIRST_TOKEN.title in capsys.readouterr().out
    assert stop.value.__notes__ == [f"1 measurements are kept in {config.output}."]
    assert len(json.loads((tmp_path / "bench.json").read_text())["measurements"]) == 1


@pytest.mark.parametrize(
    ("panels", "lines"),
    [
        (PREFILL_PANELS, [line("attention", 1.0)]),
        (DECODE_PANELS, [line("decode model", 1.0, batch=1, length=64, density=0.1)]),
    ],
)
def test_a_plot_needs_something_to_compare_with(tmp_path: Path, panels: Any, lines: list[Measurement]):
    with pytest.raises(ValueError, match="got none to draw"):
        plot_panels(tmp_path / "x.png", panels, lines)

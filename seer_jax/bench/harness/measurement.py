"""A measurement is one line of a table: an operation, a case, and what it took beside a baseline."""

import dataclasses
import datetime
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.devices import default_device
from seer_jax.bench.harness.clock import Timing, time_calls, time_carried
from seer_jax.evaluate.record import environment
from seer_jax.inference.memory import GIB, device_memory, laid_out_bytes
from seer_jax.models.dense_attention import dense_attention
from seer_jax.outputs import write_text

MEMORY_SHARE = 0.9  # of the device's memory; the rest is for what programs need besides
Results = dict[str, float | None]
DenseTime = tuple[float | None, str | None]  # milliseconds, or a note why there are none


class Outcome(NamedTuple):
    """What came out of a measurement.

    Fields:
      results: by the name of the quantity; None where it does not apply.
      note: why something does not apply.
      failure: why the results are wrong; None where they are right.
    """

    results: Results
    note: str | None = None
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of a table.

    Attributes:
      table: name of the table.
      case: what was run, by name.
      settings: what was run, by numbers.
      results, note, failure: see `Outcome`.
    """

    table: str
    case: str
    settings: Mapping[str, Any]
    results: Results = dataclasses.field(default_factory=dict)
    note: str | None = None
    failure: str | None = None


def measure(
    table: str,
    case: str,
    settings: Mapping[str, Any],
    run: Callable[[], Outcome],
    *,
    required: bool = False,
    needed_bytes: float | None = None,
) -> Measurement:
    """One line of a table; where it cannot be measured, with the reason.

    Args:
      table, case, settings: see `Measurement`.
      run: checks and times.
      required: whether it is a failure that something is not implemented; otherwise a note says so.
      needed_bytes: of the arrays, where it is no failure that the device has no memory for them: a note says so.
    """
    memory = device_memory(default_device())
    if memory is not None and (needed_bytes or 0) > MEMORY_SHARE * memory.limit:
        available = f"{MEMORY_SHARE:.0%} of the {memory.limit / GIB:.1f} GiB that JAX may use here are"
        note = (
            f"{case} needs {(needed_bytes or 0) / GIB:.1f} GiB; {available} {MEMORY_SHARE * memory.limit / GIB:.1f} GiB"
        )
        return Measurement(table, case, settings, note=f"{note} (XLA_PYTHON_CLIENT_MEM_FRACTION sets them)")
    try:
        return Measurement(table, case, settings, *run())
    except NotImplementedError as error:
        line, failed = first_line(error), required
    except jax.errors.JaxRuntimeError as error:
        line, failed = first_line(error), needed_bytes is None or "RESOURCE_EXHAUSTED" not in str(error)
    return Measurement(table, case, settings, note=None if failed else line, failure=line if failed else None)


def first_line(error: Exception) -> str:
    """What an error says in its first line."""
    return str(error).partition("\n")[0]


def beside_dense(lines: Iterable[Measurement]) -> Iterator[Measurement]:
    """The lines with their speedup over the dense one, which comes first of its size and has no density among its settings."""
    dense = None
    for line in lines:
        milliseconds = line.results.get("milliseconds")
        if line.settings["density"] is None:
            dense = milliseconds
        speedup = dense / milliseconds if dense and milliseconds else None
        yield dataclasses.replace(line, results={**line.results, "speedup": speedup}) if line.results else line


def not_finite(**arrays: Array) -> str | None:
    """What is wrong with outputs that must be finite, by their names."""
    wrong = [name for name, x in arrays.items() if not bool(jnp.isfinite(x).all())]
    return f"{', '.join(wrong)} not finite" if wrong else None


def time_dense(take: Callable[[], Timing]) -> DenseTime:
    """What `take` measures of dense attention, where this device can run it."""
    try:
        return take().milliseconds, None
    except (ValueError, RuntimeError) as error:  # NotImplementedError among them, and errors of the device
        return None, f"dense attention: {first_line(error)}"


class DenseTimes:
    """Times of dense attention of prompts as models run it, taken once per shape."""

    def __init__(self) -> None:
        self._known: dict[Any, DenseTime] = {}

    def __call__(self, q: Array, k: Array, v: Array, lengths: Array | None = None) -> DenseTime:
        shape = (q.shape, k.shape, q.dtype, None if lengths is None else tuple(lengths.tolist()))
        if shape not in self._known:
            attend = jax.jit(lambda q, k, v, lengths: dense_attention(q, k, v, lengths=lengths))
            self._known[shape] = time_dense(lambda: time_calls(attend, q, k, v, lengths))
        return self._known[shape]


def dense_results(dense: float | None, timing: Timing) -> Results:
    """A timing beside dense attention's."""
    return {"dense_milliseconds": dense, "speedup": dense and dense / timing.milliseconds}


class ProgramRun(NamedTuple):
    """Timing and last outputs of a program, what compiling it took and its memory, and a note where that is not known."""

    timing: Timing
    outputs: Any
    results: Results
    note: str | None


def run_program(function: Callable[..., tuple[Any, Any]], carried: Any, *arguments: Any) -> ProgramRun:
    """Compiles function(carried, *arguments) -> (carried, outputs) and times it, see `time_carried`; overwrites `carried`."""
    before = _peak_bytes()
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0).lower(carried, *arguments).compile()
    seconds = time.perf_counter() - start
    timing, outputs = time_carried(compiled, carried, *arguments)
    peak, memory = _peak_bytes(), compiled.memory_analysis()
    planned = (memory.argument_size_in_bytes if memory else 0) + (laid_out_bytes(compiled) or 0)
    # The device remembers its highest peak alone: what needed more before hides this one.
    results = {"compile_seconds": seconds, "peak_gib": peak / GIB if peak > before else None}
    note = "peak memory: something before needed more" if 0 < peak <= before else None
    return ProgramRun(timing, outputs, {**results, "planned_gib": planned / GIB}, note)


def _peak_bytes() -> int:
    """Most memory in use on the device so far; 0 where it does not tell."""
    return (default_device().memory_stats() or {}).get("peak_bytes_in_use", 0)


@functools.cache
def hardware() -> dict[str, Any]:
    """What measurements are taken on: devices and versions."""
    return {**environment(), "devices": jax.device_count()}


def write_json(path: Path, measurements: Sequence[Measurement], *, command: Sequence[str]) -> None:
    """Writes hardware, versions, date and command line, then `measurements`, one object each."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {**hardware(), "date": date, "command": " ".join(command)}
    report["measurements"] = [dataclasses.asdict(m) | {"results": _without_nan(m.results)} for m in measurements]
    write_text(path, json.dumps(report, indent=1, allow_nan=False, default=str) + "\n")


def _without_nan(results: Results) -> Results:
    """None in place of NaN and infinity, which JSON does not have."""
    return {name: x if x is None or math.isfinite(x) else None for name, x in results.items()}

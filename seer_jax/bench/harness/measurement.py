"""A measurement: one line of a table, guarded against what a device cannot do, and the file that holds all of them."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from seer_jax.bench.harness.clock import Timing, time_carried
from seer_jax.bench.harness.memory import default_device, memory_results, peak_bytes, too_large

PACKAGES = ("seer-jax", "jax", "jaxlib", "jax-cuda13-plugin")
Results = Mapping[str, float | None]


class Outcome(NamedTuple):
    """What came out of a measurement.

    Fields:
      results: by the name of the quantity; None where it does not apply.
      note: why something does not apply.
      failure: why the results are wrong; None where they are right.
    """

    results: Results = {}  # noqa: RUF012 - never written to
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
    outcome = Outcome(note=None if needed_bytes is None else too_large(needed_bytes))
    if outcome.note is not None:
        outcome = Outcome(note=f"{case}: {outcome.note}")
    else:
        try:
            outcome = run()
        except NotImplementedError as error:
            outcome = _without_results(error, failed=required)
        except jax.errors.JaxRuntimeError as error:
            no_memory = "RESOURCE_EXHAUSTED" in str(error)
            outcome = _without_results(error, failed=needed_bytes is None or not no_memory)
    return Measurement(table, case, settings, *outcome)


def _without_results(error: Exception, *, failed: bool) -> Outcome:
    return Outcome(failure=first_line(error)) if failed else Outcome(note=first_line(error))


def first_line(error: Exception) -> str:
    """What an error says in its first line."""
    return str(error).partition("\n")[0]


class ProgramRun(NamedTuple):
    """A compiled program that was timed.

    Fields:
      timing: of a run.
      outputs: of the last run.
      results: `compile_seconds`, `peak_gib` and `planned_gib`.
      note: where the peak is not known.
    """

    timing: Timing
    outputs: Any
    results: Results
    note: str | None


def run_program(function: Callable[..., tuple[Any, Any]], carried: Any, *arguments: Any) -> ProgramRun:
    """Compiles function(carried, *arguments) -> (carried, outputs) and times it, see `time_carried`.

    Args:
      function: not compiled yet.
      carried: given away: its memory holds what is carried on.
    """
    before = peak_bytes() or 0
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0).lower(carried, *arguments).compile()
    seconds = time.perf_counter() - start
    timing, outputs = time_carried(compiled, carried, *arguments)
    memory, note = memory_results(compiled, before)
    return ProgramRun(timing, outputs, {"compile_seconds": seconds, **memory}, note)


@functools.cache
def hardware() -> dict[str, Any]:
    """What measurements are taken on: devices and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = default_device()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": versions,
    }


def write_json(path: Path, measurements: Sequence[Measurement], *, command: Sequence[str]) -> None:
    """Writes hardware, versions, date and command line, then `measurements`, one object each."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {**hardware(), "date": date, "command": " ".join(command)}
    report["measurements"] = [_without_nan(dataclasses.asdict(m)) for m in measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False, default=str) + "\n")


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """None in place of NaN and infinity, which JSON does not have."""
    results = {k: v if v is None or math.isfinite(v) else None for k, v in line["results"].items()}
    return line | {"results": results}

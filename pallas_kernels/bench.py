"""Measurements: how time is taken, what one is written as, and the file that holds them.

An operation's folder has a `bench.py` of its own where it is measured: it checks the results first and times them then.
"""

import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

PACKAGES = ("seer-jax", "jax", "jaxlib", "jax-cuda13-plugin")
WARM_UP = 0.2  # seconds: an idle GPU takes a while to reach its clock
LONG = 1.0  # seconds: a call that takes longer is not repeated as often
QUEUED_BYTES = 2**32  # of results that wait in memory at once


class Timing(NamedTuple):
    """How long a call takes.

    Fields:
      milliseconds: of one call, median of the repetitions.
      spread: slowest less fastest repetition, over the median.
      calls: how many calls a repetition queued.
    """

    milliseconds: float
    spread: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of a report.

    Attributes:
      table: which table it is a line of.
      case: what was run, by name.
      settings: what was run, by numbers.
      results: what came out, by the name of the quantity; None where it does not apply.
      note: why something does not apply.
      failure: why the results are wrong; None where they are right.
    """

    table: str
    case: str
    settings: Mapping[str, Any]
    results: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    note: str | None = None
    failure: str | None = None


def time_calls(function: Callable[..., Any], *arguments: Any, seconds: float = 0.08, repetitions: int = 5) -> Timing:
    """Times calls of a compiled function by the clock of the host, around as many queued calls as fill `seconds`.

    Args:
      function: returns arrays, and the same work is done by each call. Compiling and warming up is not counted.
      arguments: of the calls.
      seconds: that a repetition takes at least.
      repetitions: at least 3; 3 where a single call takes longer than a second.
    """
    _run(function, arguments, 1)
    start, once = time.perf_counter(), math.inf
    while time.perf_counter() - start < min(WARM_UP, 3 * seconds):
        once = min(once, _run(function, arguments, 1))
    if once > LONG:
        calls, times = 1, [once, *(_run(function, arguments, 1) for _ in range(2))]
    else:
        calls = min(1000, math.ceil(seconds / once))
        times = [_run(function, arguments, calls) / calls for _ in range(repetitions)]
    middle = statistics.median(times)
    return Timing(1e3 * middle, (max(times) - min(times)) / middle, calls)


def _run(function: Callable[..., Any], arguments: Sequence[Any], calls: int) -> float:
    """Seconds that so many calls take, one after the other."""
    queue, start = 1, time.perf_counter()
    results = function(*arguments)
    if jax.default_backend() != "cpu":  # which would run queued calls side by side
        queue = max(1, QUEUED_BYTES // max(1, sum(x.nbytes for x in jax.tree.leaves(results))))
    for number in range(1, calls):
        if number % queue == 0:
            jax.block_until_ready(results)
        results = function(*arguments)
    jax.block_until_ready(results)
    return time.perf_counter() - start


def variants(package: str, implementation: str | None) -> dict[str, Any]:
    """The configurations by name that a backend offers as `CONFIGS`; none where it has no such choice."""
    if implementation is None:
        return {}
    return dict(getattr(importlib.import_module(f"{package}.{implementation}"), "CONFIGS", {}))


def guarded(measure: Callable[[], Measurement], blank: Measurement, *, required: bool = False) -> Measurement:
    """What `measure` returns; where it cannot be had, `blank` with the reason.

    What the device fails at is a failure. What is not implemented is one if it is `required`, else a note.
    """
    try:
        return measure()
    except NotImplementedError as error:
        return dataclasses.replace(blank, **{"failure" if required else "note": first_line(error)})
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(blank, failure=first_line(error))


def first_line(error: Exception) -> str:
    """What an error says in its first line."""
    return str(error).partition("\n")[0]


@functools.cache
def hardware() -> dict[str, Any]:
    """What the measurements were taken on: devices and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": versions,
    }


def write_report(path: Path, measurements: Sequence[Measurement], *, command: Sequence[str]) -> None:
    """JSON: hardware, versions, date and command line, then `measurements`, one object each."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {**hardware(), "date": date, "command": " ".join(command)}
    report["measurements"] = [_without_nan(dataclasses.asdict(m)) for m in measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False, default=str) + "\n")


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: None in their place."""
    results = {k: v if v is None or math.isfinite(v) else None for k, v in line["results"].items()}
    return line | {"results": results}

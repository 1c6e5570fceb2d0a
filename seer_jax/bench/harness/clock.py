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
import jax.numpy as jnp

PACKAGES = ("seer-jax", "jax", "jaxlib", "jax-cuda13-plugin")
WARM_UP = 0.2  # seconds: an idle GPU takes a while to reach its clock
LONG = 1.0  # seconds: a call that takes longer is not repeated as often
QUEUED_BYTES = 2**32  # of results that wait in memory at once
GIB = 2**30
MEMORY_SHARE = 0.9  # of the device's memory; the rest is for what programs need besides
PROGRAM_SECONDS = 4e-3  # of a program that holds many calls: against this the host's dispatch is nothing
LAUNCH_SECONDS = 5e-6  # about what a short call takes besides reading
FEWEST_CALLS = 4  # in the body of a loop, whose result may be copied once
BEYOND_CACHE = 2e8  # bytes, four times the L2 cache of an H200: after so many, nothing of them is left in it
MOST_LAYERS = 64
MOST_BYTES = 2**34  # of the caches of several layers
MOVED_BYTES = 2**30
MOVES = 16


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

    def divided(self, calls: int) -> "Timing":
        """Of one call, where what was timed holds so many."""
        return Timing(self.milliseconds / calls, self.spread, self.calls * calls)


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


def time_chain(
    step: Callable[[Any, Any, Any, int], Any], state: Any, shared: Any, operands: Sequence[Any], *, seconds: float
) -> Timing:
    """Times calls that are too short to be dispatched one by one: many of them, in one compiled program.

    The program computes state = step(state, shared, operand, number of the operand) for each operand in turn, again and again.
    Each call needs the result of the one before it, so that none can be left out, moved out of the loop, or run beside another.

    Args:
      step: returns arrays of the shapes and dtypes of `state`.
      state: what the first call takes.
      shared: arrays of all calls, passed on as they are.
      operands: arrays of one call each. What a call makes of them is made anew each time.
      seconds: about what a call takes.
    """
    numbers = list(range(len(operands)))
    if jax.default_backend() != "cpu":
        numbers *= -(-FEWEST_CALLS // len(operands))
    rounds = rounds_of(len(numbers), seconds)

    @jax.jit
    def program(state: Any, shared: Any, operands: Sequence[Any]) -> Any:
        def once(_: Any, state: Any) -> Any:
            for number in numbers:
                state, operand = jax.lax.optimization_barrier((state, operands[number]))
                state = step(state, shared, operand, number)
            return state

        return jax.lax.fori_loop(0, rounds, once, state)

    return time_calls(program, state, shared, operands).divided(rounds * len(numbers))


def rounds_of(calls: int, seconds: float) -> int:
    """How often a program repeats so many calls of about `seconds` each to take a few milliseconds."""
    if jax.default_backend() == "cpu":
        return 1
    return max(1, math.ceil(PROGRAM_SECONDS / (calls * (seconds + LAUNCH_SECONDS))))


def layers_beyond_cache(read: float, size: float) -> int:
    """How many layers' caches take turns so that no layer finds in the L2 cache what it reads, as far as limits allow.

    Args:
      read: bytes that a layer reads.
      size: bytes of its cache.
    """
    wanted = 2 if jax.default_backend() == "cpu" else math.ceil(BEYOND_CACHE / read)
    return max(1, min(wanted, MOST_LAYERS, int(MOST_BYTES // size)))


@functools.cache
def memory_rate() -> float:
    """Bytes per second of the device's memory: of a large sum or of a large copy (bytes read and bytes written), whichever has more."""
    size = MOVED_BYTES if jax.default_backend() != "cpu" else MOVED_BYTES // 2**7

    @jax.jit
    def sums(x: jax.Array) -> jax.Array:  # each of other numbers, since a sum that is known need not be read
        return jax.lax.fori_loop(0, MOVES, lambda i, total: total + (x ^ i).sum(), jnp.int32(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def copies(x: jax.Array) -> jax.Array:  # plus 1, since a plain copy could be left out
        return jax.lax.fori_loop(0, MOVES, lambda _, x: x + 1, x)

    latest = [jnp.zeros(size // 4, jnp.int32)]

    def copy() -> jax.Array:
        latest[:] = [copies(*latest)]
        return latest[0]

    reading, copying = time_calls(sums, *latest).milliseconds, time_calls(copy).milliseconds
    return size * MOVES * max(1 / reading, 2 / copying) * 1e3


def floor_results(milliseconds: float, read: float) -> dict[str, float | None]:
    """What a time is worth beside the time in which the device's memory moves as many bytes as must be read."""
    floor = read / memory_rate() * 1e3
    return {
        "floor_milliseconds": floor,
        "times_floor": milliseconds / floor,
        "read_gib": read / GIB,
        "memory_terabytes": memory_rate() / 1e12,
    }


def memory_limit() -> int | None:
    """Bytes that JAX may use on the device, where it tells."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def too_large(needed: float) -> str | None:
    """Why arrays of so many bytes are not tried here; None where they fit."""
    limit = memory_limit()
    if limit is None or needed <= MEMORY_SHARE * limit:
        return None
    return (
        f"needs {needed / GIB:.1f} GiB; {MEMORY_SHARE:.0%} of the {limit / GIB:.1f} GiB that JAX may use here are "
        f"{MEMORY_SHARE * limit / GIB:.1f} (XLA_PYTHON_CLIENT_MEM_FRACTION sets them)"
    )


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


def guarded(
    measure: Callable[[], Measurement], blank: Measurement, *, required: bool = False, must_fit: bool = True
) -> Measurement:
    """What `measure` returns; where it cannot be had, `blank` with the reason.

    What the device fails at is a failure, for want of memory only if it `must_fit`, else a note. What is not implemented is
    a failure if it is `required`, else a note.
    """
    try:
        return measure()
    except NotImplementedError as error:
        return dataclasses.replace(blank, **{"failure" if required else "note": first_line(error)})
    except jax.errors.JaxRuntimeError as error:
        small = "RESOURCE_EXHAUSTED" in str(error) and not must_fit
        return dataclasses.replace(blank, **{"note" if small else "failure": first_line(error)})


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

"""The clock: how long compiled functions take, and how fast the memory of the device is."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.devices import default_device, device_of
from seer_jax.inference.memory import GIB

WARM_UP = 0.2  # seconds: an idle GPU takes a while to reach its clock rate
LONG = 1.0  # seconds: a call that takes longer is not repeated as often
QUEUED_BYTES = 2**32  # of results that wait in memory at once
PROGRAM_SECONDS = 4e-3  # of a program that holds many calls: beside this the host's dispatch is negligible
LAUNCH_SECONDS = 5e-6  # about what a short call takes besides reading
FEWEST_CALLS = 4  # in the body of a loop, whose result may be copied once
BEYOND_CACHE = 2e8  # bytes, four times the L2 cache of an H200: after so many, nothing of them is left in it
MOST_LAYERS = 64
MOST_BYTES = 2**34  # of the caches of several layers
MOVED_BYTES = 2**30
MOVES = 16


class Timing(NamedTuple):
    """Milliseconds of a call, median of the repetitions, and slowest less fastest repetition over it."""

    milliseconds: float
    spread: float

    def divided(self, calls: int) -> "Timing":
        """The timing of one call, where what was timed holds several."""
        return Timing(self.milliseconds / calls, self.spread)


def time_calls(function: Callable[..., Any], *arguments: Any, seconds: float = 0.08, repetitions: int = 5) -> Timing:
    """Times calls of a compiled function by the clock of the host, around as many queued calls as fill `seconds`.

    Args:
      function: returns arrays, and does the same work in each call. Compiling and warming up are not counted.
      arguments: of the calls.
      seconds: that a repetition takes at least.
      repetitions: at least 3; 3 where a single call takes longer than a second.
    """
    _run(function, arguments, 1)
    start, once = time.perf_counter(), math.inf
    while time.perf_counter() - start < min(WARM_UP, 3 * seconds):
        once = min(once, _run(function, arguments, 1))
    if once > LONG:
        times = [once, *(_run(function, arguments, 1) for _ in range(2))]
    else:
        calls = min(1000, math.ceil(seconds / once))
        times = [_run(function, arguments, calls) / calls for _ in range(repetitions)]
    middle = statistics.median(times)
    return Timing(1e3 * middle, (max(times) - min(times)) / middle)


def time_in_turns(
    functions: Sequence[Callable[[], Any]], *, seconds: float = 0.08, repetitions: int = 5
) -> list[list[float]]:
    """Milliseconds of a call of each function in each repetition, all functions in turns, so that what changes meanwhile changes all.

    Args:
      functions: of compiled programs that have run once, without arguments; return arrays.
      seconds: that a function is called at least, before the next one's turn.
      repetitions: at least 3; 3 where a call takes longer than a second.
    """
    once = [_run(function, (), 1) for function in functions]
    calls = [max(1, min(1000, math.ceil(seconds / x))) for x in once]
    times: list[list[float]] = [[1e3 * x] for x in once] if max(once) > LONG else [[] for _ in functions]
    repetitions = 2 if max(once) > LONG else repetitions
    numbers = list(range(len(functions)))
    for _ in range(repetitions):
        numbers.reverse()
        for i in numbers:
            times[i].append(1e3 * _run(functions[i], (), calls[i]) / calls[i])
    return times


def time_carried(function: Callable[..., tuple[Any, Any]], carried: Any, *arguments: Any) -> tuple[Timing, Any]:
    """Times a compiled function(carried, *arguments) -> (carried, outputs), whose calls may overwrite `carried`.

    Returns:
      (timing, outputs of the last call).
    """
    latest = [carried, None]

    def run() -> Any:
        latest[:] = function(latest[0], *arguments)  # each call gives what it carries to the next one
        return latest[1]

    return time_calls(run), latest[1]


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
    if device_of(state).platform != "cpu":
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
    """How often a program repeats that many calls of about `seconds` each to take a few milliseconds."""
    if default_device().platform == "cpu":
        return 1
    return max(1, math.ceil(PROGRAM_SECONDS / (calls * (seconds + LAUNCH_SECONDS))))


def layers_beyond_cache(read: float, size: float) -> int:
    """How many layers' caches take turns so that no layer finds in the L2 cache what it reads, as far as limits allow.

    Args:
      read: bytes that a layer reads.
      size: bytes of its cache.
    """
    wanted = 2 if default_device().platform == "cpu" else math.ceil(BEYOND_CACHE / read)
    return max(1, min(wanted, MOST_LAYERS, int(MOST_BYTES // size)))


def read_seconds(read: float) -> float:
    """Time in which the memory of the device moves that many bytes."""
    return read / memory_rate(default_device())


def floor_results(milliseconds: float, read: float) -> dict[str, float | None]:
    """A time beside the time in which the memory of the device moves as many bytes as must be read."""
    return {
        "floor_milliseconds": read_seconds(read) * 1e3,
        "times_floor": milliseconds / read_seconds(read) / 1e3,
        "read_gib": read / GIB,
        "memory_terabytes": memory_rate(default_device()) / 1e12,
    }


@functools.cache
def memory_rate(device: jax.Device) -> float:  # pyright: ignore[reportInvalidTypeForm]
    """Bytes per second of the device's memory: of a large sum or of a large copy (bytes read and bytes written), whichever has more."""
    size = MOVED_BYTES if device.platform != "cpu" else MOVED_BYTES // 2**7

    @jax.jit
    def sums(x: jax.Array) -> jax.Array:  # each of other elements, since a sum that is known need not be read
        return jax.lax.fori_loop(0, MOVES, lambda i, total: total + (x ^ i).sum(), jnp.int32(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def copies(x: jax.Array) -> tuple[jax.Array, jax.Array]:  # plus 1, since a plain copy could be left out
        x = jax.lax.fori_loop(0, MOVES, lambda _, x: x + 1, x)
        return x, x[0]

    x = jnp.zeros(size // 4, jnp.int32, device=device)
    reading, copying = time_calls(sums, x), time_carried(copies, x)[0]
    return size * MOVES * max(1 / reading.milliseconds, 2 / copying.milliseconds) * 1e3


def _run(function: Callable[..., Any], arguments: Sequence[Any], calls: int) -> float:
    """Seconds that so many calls take, one after the other."""
    queue, start = 1, time.perf_counter()
    results = function(*arguments)
    if device_of(results).platform != "cpu":  # a CPU would run queued calls side by side
        queue = max(1, QUEUED_BYTES // max(1, sum(x.nbytes for x in jax.tree.leaves(results))))
    for number in range(1, calls):
        if number % queue == 0:
            jax.block_until_ready(results)
        results = function(*arguments)
    jax.block_until_ready(results)
    return time.perf_counter() - start

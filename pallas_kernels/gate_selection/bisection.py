"""Cutoffs of rows by bisection: how far down the best entries reach. For `mosaic_gpu.py`.

Rows are tiles [4, W] of one row per warp, numbers of rows [4], in the layouts `ROW_PER_WARP` and `ROW_VECTOR`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from pallas_kernels.gate_selection.warp_rows import LANES, ROW_VECTOR, WARPS, drop_repeats, own_row

ALL = 2**20  # more than any row has columns

_AVERAGES = 24  # steps by average; from there on it goes by bit pattern, which ends within 32
_CHUNK = 8 * LANES

_f32, _i32 = jnp.float32, jnp.int32


def best(
    x: Float32[Array, "4 W"],
    goal: Float32[Array, "4"],
    measure: Callable[[Array], Array],
    *,
    weighted: bool,
    interpreted: bool,
) -> tuple[Float32[Array, "4 W"], Float32[Array, "4"]]:
    """The fewest best entries that reach the goal, or all above -inf if they don't; of equal ones those that come first.

    Args:
      x: what entries are ranked by.
      goal: at least 1 if entries are counted.
      measure: what the entries from a cutoff on come to; never more for a higher cutoff.
      weighted: whether each entry comes to itself, else to 1.
      interpreted: whether JAX's interpreter runs the kernel.

    Returns:
      (x with -inf in place of equal entries that are too many, cutoff): what reaches the cutoff is best.
    """
    b = _bisect(x, goal, measure, weighted, interpreted)
    tied = (b.held > goal) & (_pattern(b.high) <= _pattern(b.low) + 1)  # one value is left, but too much of it

    def drop() -> Array:
        wanted = _round_up((goal - b.above) / b.low if weighted else goal - b.above)
        return drop_repeats(x, b.low, jnp.where(tied, wanted, ALL), interpreted)

    return lax.cond(any_row(tied, interpreted), drop, lambda: x), b.low


def count(x: Float32[Array, "4 W"], cutoff: Float32[Array, "4"]) -> Float32[Array, "4"]:
    """How many entries reach the cutoff. A sign bit is added in one instruction, a comparison in two."""
    cutoff = jnp.where(cutoff == 0, -0.0, cutoff)  # which leaves no sign when taken from zeros of either kind
    sign = lax.bitcast_convert_type(x - cutoff[:, None], _i32)
    below = lax.shift_right_logical(sign, jnp.full(x.shape, 31, _i32)).sum(axis=1)
    return (x.shape[1] - below).astype(_f32)


def any_row(rows: Bool[Array, "4"], interpreted: bool) -> Bool[Array, ""]:
    """Whether to take a branch or to go on with a loop, see `own_row`."""
    return own_row(rows.astype(_i32), interpreted) > 0


def next_up(x: Float32[Array, "4"]) -> Float32[Array, "4"]:
    """The next higher float."""
    return _from_pattern(_pattern(x) + 1)


def full(value: float) -> Shaped[Array, "4"]:
    """The same number for each row; an int gives int32."""
    return plgpu.layout_cast(jnp.full((WARPS,), value, _i32 if isinstance(value, int) else _f32), ROW_VECTOR)


class _Bracket(NamedTuple):
    """A cutoff `low` that holds enough, a higher one `high` that does not, and what they hold; [4] each."""

    low: Array
    high: Array
    held: Array
    above: Array


def _bisect(
    x: Float32[Array, "4 W"],
    goal: Float32[Array, "4"],
    measure: Callable[[Array], Array],
    weighted: bool,
    interpreted: bool,
) -> _Bracket:
    """Where the best entries begin, see `best`. If `low` holds more than the goal, it is the only value in the bracket."""
    top, bottom = x.max(axis=1), _least(x)
    above_top = next_up(jnp.where(top > -jnp.inf, top, 0.0))
    bracket = _Bracket(low=bottom, high=above_top, held=measure(bottom), above=full(0.0))

    def unsettled(state: tuple[Array, _Bracket]) -> Array:
        b = state[1]
        several = _pattern(b.high) > _pattern(b.low) + 1
        if weighted:
            several &= b.held - b.above > 1.5 * b.low  # whatever is in the bracket comes to `low` or more
        return any_row((b.held > goal) & several, interpreted)

    def halve(state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        step, b = state
        middle = _middle(b, step, by_pattern=weighted)
        held = measure(middle)
        enough = held >= goal
        low, high = jnp.where(enough, middle, b.low), jnp.where(enough, b.high, middle)
        return step + 1, _Bracket(low, high, jnp.where(enough, held, b.held), jnp.where(enough, b.above, held))

    return lax.while_loop(unsettled, halve, (_i32(0), bracket))[1]


def _least(x: Float32[Array, "4 W"]) -> Float32[Array, "4"]:
    """The least entry of each row above -inf, inf if there is none. Each step waits for the one before, which saves registers."""
    size = min(_CHUNK, x.shape[1])
    least = jnp.full_like(x[:, :size], jnp.inf)
    for first in (*range(0, x.shape[1] - size, size), x.shape[1] - size):
        part = x[:, first : first + size]
        least = jnp.minimum(least, jnp.where(part > -jnp.inf, part, least))
    return least.min(axis=1)


def _middle(b: _Bracket, step: Array, *, by_pattern: bool) -> Float32[Array, "4"]:
    """Between low and high. By bit pattern a bracket ends within 32 steps; the average is sooner there for ordinary logits."""
    low, high = _pattern(b.low), _pattern(b.high)
    middle = _from_pattern((low & high) + ((low ^ high) >> 1))  # the average of integers whose sum overflows
    if by_pattern:
        return middle
    return jnp.where(jnp.broadcast_to(step, middle.shape) < _AVERAGES, 0.5 * b.low + 0.5 * b.high, middle)


def _pattern(x: Float32[Array, "4"]) -> Int32[Array, "4"]:
    """The bits of floats as integers in the same order."""
    bits = lax.bitcast_convert_type(x, _i32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_pattern(pattern: Int32[Array, "4"]) -> Float32[Array, "4"]:
    return lax.bitcast_convert_type(pattern ^ ((pattern >> 31) & 0x7FFFFFFF), _f32)


def _round_up(x: Float32[Array, "4"]) -> Int32[Array, "4"]:
    """The least integer from x on, or `ALL` at most."""
    x = jnp.minimum(x, float(ALL))
    whole = x.astype(_i32)
    return whole + (whole.astype(_f32) < x).astype(_i32)

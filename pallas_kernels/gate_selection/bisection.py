"""Cutoffs by bisection: the lowest of the top entries of each row. For `mosaic_gpu.py`.

Rows are tiles [4, W] of one row per warp, or of the quarters of one row (`RowParts`), in the layout `ROW_PER_WARP`; [4] has one element per
warp, that of its row, in the layout `ROW_VECTOR`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from pallas_kernels.gate_selection.row_parts import RowParts
from pallas_kernels.gate_selection.warp_rows import LANES, ROW_VECTOR, WARPS, own_row

ALL = 2**20  # more columns than any row has

_AVERAGES = 24  # steps that bisect by value; later ones bisect by bit pattern, which takes 32 at most
_CHUNK = 8 * LANES

_f32, _i32 = jnp.float32, jnp.int32


def best(
    x: Float32[Array, "4 W"],
    goal: Float32[Array, "4"],
    measure: Callable[[Array], Array],
    *,
    weighted: bool,
    parts: RowParts,
) -> tuple[Float32[Array, "4 W"], Float32[Array, "4"]]:
    """Smallest set of top entries whose measure reaches the goal: all above -inf if they do not reach it; among equals, the first.

    Args:
      x: values by which entries are ranked.
      goal: at least 1 if entries are counted.
      measure: measure of the entries from a cutoff on, non-increasing in the cutoff.
      weighted: whether the measure of an entry is its value; otherwise it is 1.
      parts: what the warps hold.

    Returns:
      (x with -inf in place of superfluous ties, cutoff): the set is that of the entries from the cutoff on.
    """
    b = _bisect(x, goal, measure, weighted, parts)
    tied = (b.held > goal) & (_pattern(b.high) <= _pattern(b.low) + 1)  # a single value is left, with too many entries

    def drop() -> Array:
        wanted = _round_up((goal - b.above) / b.low if weighted else goal - b.above)
        return parts.drop_repeats(x, b.low, jnp.where(tied, wanted, ALL))

    return lax.cond(any_row(tied, parts.interpreted), drop, lambda: x), b.low


def count(x: Float32[Array, "4 W"], parts: RowParts, cutoff: Float32[Array, "4"]) -> Float32[Array, "4"]:
    """Number of entries from the cutoff on. Adding a sign bit takes one instruction, adding a comparison two."""
    # Subtracting -0.0 from a zero of either sign gives +0.0, which has no sign bit.
    cutoff = jnp.where(cutoff == 0, -0.0, cutoff)
    sign = lax.bitcast_convert_type(x - cutoff[:, None], _i32)
    below = lax.shift_right_logical(sign, jnp.full(x.shape, 31, _i32)).sum(axis=1)
    return parts.joined((x.shape[1] - below).astype(_f32), jnp.sum)


def any_row(rows: Bool[Array, "4"], interpreted: bool) -> Bool[Array, ""]:
    """The warp's own element as the condition of a branch or a loop, see `own_row`."""
    return own_row(rows.astype(_i32), interpreted) > 0


def next_up(x: Float32[Array, "4"]) -> Float32[Array, "4"]:
    """The next larger float."""
    return _from_pattern(_pattern(x) + 1)


def full(value: float) -> Shaped[Array, "4"]:
    """The same value for each row, int32 for an int."""
    return plgpu.layout_cast(jnp.full((WARPS,), value, _i32 if isinstance(value, int) else _f32), ROW_VECTOR)


class _Bracket(NamedTuple):
    """Cutoffs `low`, which reaches the goal, and `high`, which does not, and their measures `held` and `above`; [4] each."""

    low: Array
    high: Array
    held: Array
    above: Array


def _bisect(
    x: Float32[Array, "4 W"],
    goal: Float32[Array, "4"],
    measure: Callable[[Array], Array],
    weighted: bool,
    parts: RowParts,
) -> _Bracket:
    """Brackets the cutoff of `best`. If the measure of `low` exceeds the goal at the end, `low` is the only value in the bracket."""
    top, bottom = parts.max(x), parts.joined(_least(x), jnp.min)
    above_top = next_up(jnp.where(top > -jnp.inf, top, 0.0))
    bracket = _Bracket(low=bottom, high=above_top, held=measure(bottom), above=full(0.0))

    def unsettled(state: tuple[Array, _Bracket]) -> Array:
        b = state[1]
        several = _pattern(b.high) > _pattern(b.low) + 1
        if weighted:
            several &= b.held - b.above > 1.5 * b.low  # every entry in the bracket measures `low` or more
        return any_row((b.held > goal) & several, parts.interpreted)

    def halve(state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        step, b = state
        middle = _middle(b, step, by_pattern=weighted)
        held = measure(middle)
        enough = held >= goal
        low, high = jnp.where(enough, middle, b.low), jnp.where(enough, b.high, middle)
        return step + 1, _Bracket(low, high, jnp.where(enough, held, b.held), jnp.where(enough, b.above, held))

    return lax.while_loop(unsettled, halve, (_i32(0), bracket))[1]


def _least(x: Float32[Array, "4 W"]) -> Float32[Array, "4"]:
    """Smallest entry of each row above -inf, inf if there is none. Each step depends on the previous one, which saves registers."""
    size = min(_CHUNK, x.shape[1])
    least = jnp.full_like(x[:, :size], jnp.inf)
    for first in (*range(0, x.shape[1] - size, size), x.shape[1] - size):
        part = x[:, first : first + size]
        least = jnp.minimum(least, jnp.where(part > -jnp.inf, part, least))
    return least.min(axis=1)


def _middle(b: _Bracket, step: Array, *, by_pattern: bool) -> Float32[Array, "4"]:
    """A value between low and high. Bisecting bit patterns ends within 32 steps; averages get there sooner for ordinary logits."""
    low, high = _pattern(b.low), _pattern(b.high)
    middle = _from_pattern((low & high) + ((low ^ high) >> 1))  # the average without overflow
    if by_pattern:
        return middle
    return jnp.where(jnp.broadcast_to(step, middle.shape) < _AVERAGES, 0.5 * b.low + 0.5 * b.high, middle)


def _pattern(x: Float32[Array, "4"]) -> Int32[Array, "4"]:
    """Bit patterns as integers that are ordered like the floats."""
    bits = lax.bitcast_convert_type(x, _i32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_pattern(pattern: Int32[Array, "4"]) -> Float32[Array, "4"]:
    return lax.bitcast_convert_type(pattern ^ ((pattern >> 31) & 0x7FFFFFFF), _f32)


def _round_up(x: Float32[Array, "4"]) -> Int32[Array, "4"]:
    """ceil(x), at most `ALL`."""
    x = jnp.minimum(x, float(ALL))
    whole = x.astype(_i32)
    return whole + (whole.astype(_f32) < x).astype(_i32)

"""Blocks needed: the share of the blocks with which a method stays within a target of dense perplexity."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.score import Score, dense_of, loss_differences, to_json
from seer_jax.evaluate.statistics.intervals import Interval, interval_of_mean
from seer_jax.selection.rules import RULES

TARGET = 0.01  # perplexity over dense
LEAST_LEVELS = 3  # of a ladder
LARGEST = 1e6  # nats; infinite losses cannot be interpolated
BELOW, ABOVE = -math.inf, math.inf  # the ladder


@dataclasses.dataclass(frozen=True)
class BlocksNeeded:
    """Blocks that one method needs under one rule.

    Attributes:
      phase, method: as in `Score`.
      rule: name of the rule, with the settings that all levels share, as a command line writes them.
      target: perplexity over dense that must not be exceeded: 0.01 is 1%.
      kept: share of the blocks that is needed; -inf: the sparsest level is within the target, inf: no level is.
      low, high: ends of its 95% interval, -inf and inf where they lie outside the ladder; NaN with a single window.
      ladder: shares of the blocks that the sparsest and the densest level keep.
      levels: number of levels.
    """

    phase: Phase
    method: str
    rule: str
    target: float
    kept: float
    low: float
    high: float
    ladder: tuple[float, float]
    levels: int

    def to_json(self) -> dict[str, Any]:
        """The fields; `kept`, `low` and `high` are None outside the ladder, and `is_below`, `is_above` tell on which side `kept` lies."""
        sides = {"is_below": self.kept == BELOW, "is_above": self.kept == ABOVE}
        return to_json({**dataclasses.asdict(self), "phase": self.phase.value, **sides})


def blocks_needed(ladder: Sequence[Score], dense: Score, *, target: float = TARGET) -> tuple[float, float, float]:
    """Share of the blocks that keeps perplexity within `target` of dense, and its 95% interval.

    The loss over dense (`loss_differences`, mean over windows) falls as more is kept: it is made monotone by isotonic regression over
    the levels in the order of their measured shares, and interpolated between them, linearly in asinh(10 loss / target): by its
    logarithm above a tenth of the target, as it falls roughly exponentially, and evenly near 0, where it may be negative. The interval
    holds the shares at which the target lies within the band of the levels' 95% intervals: the ends are where their lower and their
    upper ends, treated alike, meet the target.

    Args:
      ladder: scores of one method at several levels.
      dense: of dense attention on the same windows.
      target: perplexity over dense, above 0.

    Returns:
      (share, low, high). -inf: less than the sparsest level keeps; inf: more than the densest one. The ends are NaN with one window.

    Raises:
      ValueError: the target is not above 0, there are fewer than two levels, or the scores are of different windows.
    """
    kept, bands = _bands(ladder, dense, target)
    value, low, high = (_crossing(kept, np.array(losses), target) for losses in bands)
    return value, low, high


def loss_at(ladder: Sequence[Score], dense: Score, share: float, *, target: float = TARGET) -> Interval:
    """Perplexity over dense at a share of the blocks, with its 95% interval, by the interpolation of `blocks_needed`.

    Args:
      ladder, dense: as in `blocks_needed`.
      share: of the visible blocks, in (0, 1].
      target: the loss near which the interpolation is logarithmic.

    Returns:
      Perplexity over dense, less 1; NaN where the share lies outside those of the ladder, the ends also with one window.

    Raises:
      ValueError: as in `blocks_needed`.
    """
    kept, bands = _bands(ladder, dense, target)

    def at(losses: Float64[np.ndarray, "n"]) -> float:
        if np.isnan(losses).any() or not kept[0] <= share <= kept[-1]:
            return math.nan
        loss = np.sinh(np.interp(share, kept, _heights(losses, target))) * target / 10
        with np.errstate(over="ignore"):
            return float(np.expm1(loss))

    return Interval(*map(at, bands))


def _bands(ladder: Sequence[Score], dense: Score, target: float) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Shares of the levels in ascending order, and their losses over dense with the ends of their intervals."""
    if not target > 0:
        raise ValueError(f"target, the perplexity over dense to stay within, must be above 0; got {target}.")
    if len(ladder) < 2:
        raise ValueError(f"A ladder must have at least two levels; got {len(ladder)}. Measure more policies.")
    levels = sorted(ladder, key=lambda score: score.kept)
    intervals = [interval_of_mean(loss_differences(score, dense)) for score in levels]
    return np.array([score.kept for score in levels]), tuple(np.array(x) for x in zip(*intervals, strict=True))


def _heights(losses: Float64[np.ndarray, "n"], target: float) -> Float64[np.ndarray, "n"]:
    """The losses made monotone, on the scale on which they are interpolated."""
    from scipy.optimize import isotonic_regression  # takes a third of a second

    losses = np.clip(losses, -LARGEST, LARGEST)
    return np.arcsinh(10 * isotonic_regression(losses, increasing=False).x / target)


def _crossing(kept: Float64[np.ndarray, "n"], losses: Float64[np.ndarray, "n"], target: float) -> float:
    """The smallest share at which the losses, made monotone, meet the target."""
    if np.isnan(losses).any():  # as the ends are with one window
        return math.nan
    heights = _heights(losses, target)
    goal = float(np.arcsinh(10 * math.log1p(target) / target))
    reached = np.flatnonzero(heights <= goal)
    if not len(reached):
        return ABOVE
    place = reached[0]
    if place == 0:
        return BELOW
    share = (heights[place - 1] - goal) / (heights[place - 1] - heights[place])
    return float(kept[place - 1] + share * (kept[place] - kept[place - 1]))


def all_blocks_needed(scores: Sequence[Score], *, target: float = TARGET) -> list[BlocksNeeded]:
    """Blocks needed by each phase, method and rule that has a ladder: `LEAST_LEVELS` levels or more that differ in the rule's value alone.

    By phase, and within a phase the fewest blocks first.
    """
    found = []
    for (phase, method, rule, _), ladder in ladders(scores).items():
        dense = dense_of(ladder[0], scores)
        if dense is not None and len(ladder) >= LEAST_LEVELS:
            kept = [score.kept for score in ladder]
            needed = blocks_needed(ladder, dense, target=target)
            found.append(BlocksNeeded(phase, method, rule, target, *needed, (min(kept), max(kept)), len(ladder)))
    phases = list(Phase)
    return sorted(found, key=lambda one: (phases.index(one.phase), one.kept))


def ladders(scores: Sequence[Score]) -> dict[tuple[Phase, str, str, str], list[Score]]:
    """Scores of levels that differ in the rule's value alone, by phase, method, rule, and what else the policies have in common."""
    found: dict[tuple[Phase, str, str, str], list[Score]] = {}
    for score in scores:
        if score.method is not None and score.policy.get("rule") in RULES and math.isfinite(score.kept):
            found.setdefault((score.phase, score.method, _rule(score), _rest(score)), []).append(score)
    return found


def _rule(score: Score) -> str:
    """The rule as a command line writes it, without its value: "topk,dense_layers=2"."""
    settings = score.level.partition(",")[2]
    per_head = isinstance(score.policy.get(RULES[score.policy["rule"]].value), list)
    return score.policy["rule"] + (" per head" if per_head else "") + (f",{settings}" if settings else "")


def _rest(score: Score) -> str:
    """All of the policy but the rule's value."""
    value = RULES[score.policy["rule"]].value
    return json.dumps({name: x for name, x in score.policy.items() if name != value}, sort_keys=True)

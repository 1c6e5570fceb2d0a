"""What the demo compares at a share of the blocks: calibrated thresholds of gate and oracle, one threshold, and baselines by top-k."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from seer_jax.calibrate import Calibration, Quantity, Target, calibrate
from seer_jax.calibrate.calibration import num_steps
from seer_jax.evaluate.levels import Phase, SparsityLevel
from seer_jax.evaluate.score import Score, perplexity_over
from seer_jax.models.decoder import Transformer
from seer_jax.selection.scorers import LearnedGate, Oracle, Random, Scorer, SinkWindow

RULES = ("threshold",)
CALIBRATED = "calibrated"
ONE_THRESHOLD, TOP_K = "one threshold", "top-k"  # titles of `Calibration.rivals`
BASELINES: tuple[Scorer, ...] = (SinkWindow(), Random())
CALIBRATED_SCORERS: tuple[Scorer, ...] = (LearnedGate(), Oracle())

Progress = Callable[[str], None]


def level_at(density: float, means: str) -> str:
    """Name of a level: "20% calibrated"."""
    return f"{100 * density:g}% {means}"


def least_share(blocks: int) -> float:
    """Share of the visible blocks that no policy can go below while decoding a text of so many: its first block and each token's own."""
    return (2 * blocks - 1) / (blocks * (blocks + 1) / 2)


def calibrated_levels(
    model: Transformer, windows: Int[np.ndarray, "n T"], densities: Sequence[float], progress: Progress
) -> list[SparsityLevel]:
    """The levels of both phases at each share of the blocks, every row of a prompt sparse.

    Args:
      model: with both gates.
      windows: to calibrate on; none of them may be scored.
      densities: shares of the visible blocks to keep, mean over rows, layers and heads.
      progress: called with a word after each of `num_calibration_steps`.

    Raises:
      ValueError: a share is smaller than what the highest threshold keeps.
    """
    levels = []
    for phase in Phase:
        for density in dict.fromkeys(densities):
            target = Target(Quantity.DENSITY, density)
            gate, oracle = (
                calibrate(model, windows, target, phase=phase, scorer=scorer, rules=RULES, progress=progress)
                for scorer in CALIBRATED_SCORERS
            )
            levels += _levels(phase, density, gate, oracle)
    return levels


def num_calibration_steps(windows: int, densities: Sequence[float]) -> int:
    """How often `calibrated_levels` calls `progress`."""
    steps = sum(num_steps(Target(Quantity.DENSITY, x), RULES, windows) for x in dict.fromkeys(densities))
    return steps * len(Phase) * len(CALIBRATED_SCORERS)


def _levels(phase: Phase, density: float, gate: Calibration, oracle: Calibration) -> list[SparsityLevel]:
    made: list[tuple[str, Any, tuple[Scorer, ...]]] = [
        (CALIBRATED, gate.policy, (LearnedGate(),)),
        (ONE_THRESHOLD, gate.rivals[ONE_THRESHOLD], (LearnedGate(),)),
        (TOP_K, gate.rivals[TOP_K], BASELINES),
        (CALIBRATED, oracle.policy, (Oracle(),)),
    ]
    return [SparsityLevel(level_at(density, means), policy, (phase,), methods) for means, policy, methods in made]


def at_equal_shares(scores: Sequence[Score]) -> list[Score]:
    """Scores of the calibrated gate and of the baselines under one name for each share of the blocks: "20% of the blocks"."""
    means = {LearnedGate.name: CALIBRATED, **{baseline.name: TOP_K for baseline in BASELINES}}
    found = []
    for score in scores:
        share, _, own = score.level.partition(" ")
        if own and own == means.get(score.method or ""):
            found.append(dataclasses.replace(score, level=f"{share} of the blocks"))
    return found


def gains(scores: Sequence[Score]) -> list[str]:
    """One line for each phase and share: the calibrated gate's perplexity over the gate's with one threshold."""
    found, lines = {score.key: score for score in scores}, []
    for (phase, method, level), one in found.items():
        share, _, means = level.partition(" ")
        ours = found.get((phase, LearnedGate.name, f"{share} {CALIBRATED}"))
        if method == LearnedGate.name and means == ONE_THRESHOLD and ours is not None:
            over = perplexity_over(ours, one).written()
            reads = f"{ours.kept:.1%} of the blocks read against {one.kept:.1%}"
            lines.append(f"{phase} {share}: perplexity {over} over one threshold's, {reads}")
    return lines

"""What a calibration is worth on text that it has not seen, beside one value for all layers and heads."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.markup import escape

from seer_jax.calibrate.calibration import Calibration, by_list, losses
from seer_jax.calibrate.collect import kept_mass
from seer_jax.evaluate.scoring import perplexity, row_batches
from seer_jax.evaluate.statistics.intervals import Interval, interval_of_mean
from seer_jax.evaluate.table import figure_table
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import RankingPolicy

CALIBRATED = "calibrated"
LEGEND = (
    "kept: share of the visible blocks; mass: share of the attention mass in them; "
    "over: perplexity over that of dense attention, with its 95% interval over windows"
)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One policy on the held-out windows.

    Attributes:
      title: of the policy.
      policy: that ran.
      kept: share of the visible blocks.
      kept_mass: share of the attention mass in them, with the inputs that dense attention gives each layer.
      rises: mean loss of each window minus that of dense attention, nats.
    """

    title: str
    policy: Policy
    kept: float
    kept_mass: float
    rises: tuple[float, ...]

    @property
    def over(self) -> float:
        """Perplexity over that of dense attention, minus 1."""
        return math.expm1(float(np.mean(self.rises)))

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `over`, by Student's t over the windows' differences; NaN for one window."""
        _, low, high = interval_of_mean(self.rises)
        return math.expm1(low), math.expm1(high)

    @property
    def shown(self) -> str:
        """`over` with its interval, as text."""
        return Interval(self.over, *self.interval).written()

    def to_json(self) -> dict[str, Any]:
        """For files; NaN becomes null."""
        finite = [None if math.isnan(x) else x for x in self.interval]
        values = dict(kept=self.kept, kept_mass=self.kept_mass, over=self.over, interval=finite, rises=list(self.rises))
        return {"title": self.title, "policy": policy_to_json(self.policy), **values}


@dataclasses.dataclass(frozen=True)
class Report:
    """A calibration on held-out windows.

    Attributes:
      calibration: that was made.
      dense: perplexity of dense attention.
      rows: the calibrated policy first.
    """

    calibration: Calibration
    dense: float
    rows: tuple[HeldOut, ...]

    def to_json(self) -> dict[str, Any]:
        """For files."""
        made = self.calibration
        calibration = dict(
            phase=made.phase.value,
            target={made.target.quantity.value: made.target.value},
            length=made.length,
            density=made.density,
            kept_mass=made.kept_mass,
            over=made.over,
        )
        return {**calibration, "dense_perplexity": self.dense, "held_out": [row.to_json() for row in self.rows]}


def held_out_report(
    model: Transformer,
    windows: Int[np.ndarray, "n T"],
    calibration: Calibration,
    *,
    progress: Callable[[str], None] = lambda word: None,
) -> Report:
    """Measures the calibrated policy and its rivals.

    Args:
      model: that was calibrated.
      windows: of text that was not used for it.
      calibration: see `calibrate`.
      progress: called with a word after each policy.
    """
    phase = calibration.phase
    dense, _ = losses(model, windows, Dense(), phase)
    policies: Mapping[str, Policy] = {CALIBRATED: calibration.policy, **calibration.rivals}
    rows = []
    for title, policy in policies.items():
        every, (found, kept) = by_list(model, policy, phase), losses(model, windows, policy, phase)
        batches = [kept_mass(model, jnp.asarray(x), every, phase=phase)[:n] for x, n in row_batches(model, windows)]
        rows.append(
            HeldOut(
                title,
                policy,
                float(kept.mean()),
                float(np.concatenate(batches).mean()),
                tuple((found - dense).tolist()),
            )
        )
        progress(f"{title}: {rows[-1].kept:.1%} of the blocks, {rows[-1].shown} over dense")
    return Report(calibration, perplexity(dense), tuple(rows))


def print_report(console: Console, report: Report) -> None:
    """Prints the table of a report, and the meaning of its words."""
    phase = report.calibration.phase.value
    table = figure_table([phase, "kept", "mass", "over"], text=[phase])
    table.add_row(f"dense, perplexity {report.dense:.3f}", "100.0%", "100.0%")
    for row in report.rows:
        table.add_row(escape(_named(row)), f"{row.kept:.1%}", f"{row.kept_mass:.1%}", row.shown)
    console.print(table)
    console.print(LEGEND, highlight=False)


def _named(row: HeldOut) -> str:
    """The title with the policy's value."""
    assert isinstance(row.policy, RankingPolicy)
    value = getattr(row.policy, row.policy.value)
    return f"{row.title}, {row.policy.name}" if np.ndim(value) else f"{row.title}, {value:.3g}"

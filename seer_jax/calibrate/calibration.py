"""Calibration: values of a rule per layer and head that meet a target, chosen on a few windows of text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from seer_jax.calibrate.choose import at_levels, cheapest_levels, one_level, unreachable
from seer_jax.calibrate.collect import MAX_BLOCKS, collect_curves
from seer_jax.calibrate.levels import GRIDS, Curves
from seer_jax.calibrate.sensitivity import output_gradients
from seer_jax.calibrate.target import Quantity, Target
from seer_jax.evaluate.levels import Phase, gates_by_phase
from seer_jax.evaluate.scoring import row_batches, score_each, score_prompts, score_windows
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import RankingPolicy, Threshold, TopK
from seer_jax.selection.scorers import LearnedGate, Scorer

SEARCH_STEPS = 8  # of a density whose loss or kept mass is to meet a target
CAUTIONS = (1.0, 0.1, 10.0)  # see `Curves.cautious`; the one that does best on windows that it was not made of is taken
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A calibrated policy, and what it should be compared with.

    Attributes:
      phase: where it works.
      target: what it was to meet.
      policy: with values `[L, heads]`, and every row sparse (`dense_last_rows=0`).
      density, kept_mass: on the calibration windows, with the inputs that dense attention gives each layer.
      over: perplexity over that of dense attention, minus 1, on the calibration windows; None where it was not measured.
      length: tokens of a calibration window.
      rivals: by title, policies of about the same density with one value for all layers and heads.
    """

    phase: Phase
    target: Target
    policy: RankingPolicy
    density: float
    kept_mass: float
    over: float | None
    length: int
    rivals: Mapping[str, Policy]


def calibrate(
    model: Transformer,
    windows: Int[np.ndarray, "n T"],
    target: Target,
    *,
    phase: Phase,
    scorer: Scorer | None = None,
    rules: Sequence[str] = tuple(GRIDS),
    progress: Progress = lambda word: None,
) -> Calibration:
    """Chooses thresholds, or masses, per layer and head.

    See the README of this folder for the method. One backward and one forward pass over each window, then a few sparse ones.

    Args:
      model: with the gate that the scorer needs.
      windows: calibration text, no padding; T is a multiple of the block size. Softmax over more blocks gives each a smaller share, so
        thresholds fit the length that they were calibrated at; masses depend on it less.
      target: what to meet at the least loss, or at the least density.
      phase: where the policy is to work.
      scorer: what ranks the blocks; None: the learned gate.
      rules: names of `GRIDS`; of several, the one that does best on the windows is taken.
      progress: called with a word after each pass over the windows.

    Raises:
      ValueError: the windows do not fit the block size, the gate is missing, or the target can't be met.
    """
    found = Statistics.of(model, windows, phase=phase, scorer=scorer or LearnedGate(), rules=rules, progress=progress)
    search = {Quantity.DENSITY: _for_density, Quantity.OVER: _for_loss, Quantity.KEPT_MASS: _for_kept_mass}
    choice, density, over = search[target.quantity](found, target.value, progress)
    levels = found.levels(choice, density)
    real = found.density(choice.rule, levels)
    policy, mass = found.policy(choice.rule, levels), found.kept_mass(choice.rule, levels)
    return Calibration(phase, target, policy, real, mass, over, found.length, found.rivals(real))


def check_windows(length: int, block_size: int) -> None:
    """Raises ValueError where windows of `length` tokens can't be calibrated on."""
    if length % block_size or not 2 <= length // block_size <= MAX_BLOCKS:
        raise ValueError(
            f"`length`, the tokens of a calibration window, must be a multiple of the block size {block_size}, from {2 * block_size} to "
            f"{MAX_BLOCKS * block_size}; got {length}."
        )


class Choice(NamedTuple):
    """How levels are chosen at a density.

    Fields:
      rule: name in `GRIDS`.
      caution: see `Curves.cautious`.
    """

    rule: str
    caution: float

    def __str__(self) -> str:
        return f"{self.rule}, caution {self.caution:g}"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the calibration windows say, and policies made of it.

    Attributes:
      curves: by rule, `[L, heads, N]`, mean over windows.
      halves: the same of every other window, from the first and from the second one on; of a single window, its curves twice.
      dense_layers: the first layers, which the gate leaves dense.
      others: as in `calibrate`.
    """

    model: Transformer
    windows: Int[np.ndarray, "n T"]
    phase: Phase
    scorer: Scorer
    curves: Mapping[str, Curves]
    halves: Sequence[Mapping[str, Curves]]
    dense_layers: int

    @classmethod
    def of(
        cls,
        model: Transformer,
        windows: Int[np.ndarray, "n T"],
        *,
        phase: Phase,
        scorer: Scorer,
        rules: Sequence[str],
        progress: Progress = lambda word: None,
    ) -> "Statistics":
        gate, config = gates_by_phase(model)[phase], model.config
        probe = Threshold(0.0, scorer)
        probe.check_phase(phase)
        model.segments(probe, gate, config.num_heads if phase is Phase.PREFILL else config.num_kv_heads, phase)
        check_windows(windows.shape[1], probe.tokens_per_block(gate))
        found: list[dict[str, Curves]] = []
        for batch, count in row_batches(model, windows):
            tokens = jnp.asarray(batch)
            gradients = output_gradients(model, tokens)
            curves = collect_curves(model, tokens, gradients, scorer, phase=phase, rules=tuple(rules))
            of_rows = jax.tree.map(np.float64, jax.device_get(curves))
            for row in range(count):
                found.append(jax.tree.map(lambda x, row=row: x[row], of_rows))
                progress(f"window {len(found)} of {len(windows)}")
        halves = [_mean(found[first::2] or found) for first in (0, 1)]
        return cls(model, windows, phase, scorer, _mean(found), halves, probe.dense_first_layers(gate))

    @property
    def choices(self) -> list[Choice]:
        """That are tried; of a single window, which nothing can be checked against, the most cautious ones."""
        cautions = CAUTIONS if len(self.windows) > 1 else (max(CAUTIONS),)
        return [Choice(rule, caution) for caution in cautions for rule in self.curves]

    @property
    def length(self) -> int:
        """T."""
        return self.windows.shape[1]

    def levels(
        self, choice: Choice, density: float, curves: Mapping[str, Curves] | None = None
    ) -> Int[np.ndarray, "L heads"]:
        """See `cheapest_levels`; of the curves of all windows unless others are given."""
        own = (self.curves if curves is None else curves)[choice.rule]
        return cheapest_levels(own.cautious(choice.caution, density), density, dense_layers=self.dense_layers)

    def density(self, rule: str, levels: Int[np.ndarray, "L heads"]) -> float:
        """Share of the visible blocks that these levels keep."""
        return at_levels(np.asarray(self.curves[rule].density), levels, dense_layers=self.dense_layers, dense=1)

    def kept_mass(self, rule: str, levels: Int[np.ndarray, "L heads"]) -> float:
        """Share of the attention mass that these levels keep."""
        return 1 - at_levels(np.asarray(self.curves[rule].missed), levels, dense_layers=self.dense_layers, dense=0)

    def policy(self, rule: str, levels: Int[np.ndarray, "L heads"]) -> RankingPolicy:
        """The policy of these levels, every row sparse."""
        grid = GRIDS[rule]
        values = np.asarray(grid.values, np.float32)[levels]
        return grid.rule(values, self.scorer, dense_last_rows=0)

    def rivals(self, density: float) -> dict[str, Policy]:
        """Policies of about this density that share one value over layers and heads."""
        share: dict[str, Policy] = {}
        for name, title in (("threshold", "one threshold"), ("mass", "one cumulative mass")):
            if name in self.curves:
                value = one_level(self.curves[name], GRIDS[name], density, dense_layers=self.dense_layers)
                share[title] = GRIDS[name].rule(value, self.scorer, dense_last_rows=0)
        return share | {"top-k": self._top_k(density)}

    def over(self, choice: Choice, density: float) -> float:
        """Measured perplexity over that of dense attention, minus 1: of each half of the windows under levels that the other half chose."""
        rises = []
        for half, windows, dense in zip(self.halves[::-1], self._halved, self._dense, strict=True):
            levels = self.levels(choice, max(density, _floor(self, choice.rule, half)), half)
            rises += (losses(self.model, windows, self.policy(choice.rule, levels), self.phase)[0] - dense).tolist()
        return math.expm1(float(np.mean(rises)))

    @property
    def _halved(self) -> list[Int[np.ndarray, "m T"]]:
        """The windows of the halves; none in the second one of a single window."""
        return [self.windows[0::2], self.windows[1::2]]

    @functools.cached_property
    def _dense(self) -> list[Float[np.ndarray, "m"]]:
        return [losses(self.model, windows, Dense(), self.phase)[0] for windows in self._halved]

    def _top_k(self, density: float) -> TopK:
        """The top-k policy whose lists, without the row's own block where it comes on top, are nearest to a density."""
        layers = self.model.config.num_layers
        wanted = (density * layers - self.dense_layers) / (layers - self.dense_layers)
        blocks = self.length // TopK(1.0).tokens_per_block(gates_by_phase(self.model)[self.phase])
        visible = np.arange(1, blocks + 1)

        def share(policy: TopK) -> float:
            if self.phase is Phase.PREFILL:
                kept = np.minimum(policy.blocks_per_row(blocks), visible)
            else:
                kept = np.array([policy.blocks_per_token(int(n)) for n in visible])
            return kept.sum() / visible.sum()

        tried = [TopK(round(float(x), 4), self.scorer, dense_last_rows=0) for x in np.linspace(0.005, 1, 400)]
        return min(tried, key=lambda policy: abs(share(policy) - wanted))


def losses(
    model: Transformer, windows: Int[np.ndarray, "n T"], policy: Policy, phase: Phase
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Mean loss of each window under a policy, nats, and the share of the blocks that it kept there."""
    policy = by_list(model, policy, phase)
    # Dense attention computes the same in either phase.
    score = score_prompts if phase is Phase.PREFILL or policy.is_dense else score_windows
    found = score_each(score, model, windows, policy)
    if found is None:
        return np.zeros(0), np.zeros(0)
    return np.asarray(found.nll).mean(-1, dtype=np.float64), np.asarray(found.kept, np.float64)


def by_list(model: Transformer, policy: Policy, phase: Phase) -> Policy:
    """The policy with every value as `[L, heads]`, so that policies of one rule share a compiled program."""
    config = model.config
    shape = config.num_layers, config.num_heads if phase is Phase.PREFILL else config.num_kv_heads
    values = {name: np.broadcast_to(np.float32(getattr(policy, name)), shape) for name in policy.per_head}
    return dataclasses.replace(policy, **values) if values else policy


def _mean(found: Sequence[Mapping[str, Curves]]) -> dict[str, Curves]:
    return {rule: jax.tree.map(lambda *x: sum(x) / len(x), *(one[rule] for one in found)) for rule in found[0]}


def num_steps(target: Target, rules: Sequence[str], windows: int) -> int:
    """How often `calibrate` calls `progress`, at most."""
    choices = len(CAUTIONS) * len(rules)
    return windows + {Quantity.DENSITY: choices, Quantity.OVER: choices + 2 * SEARCH_STEPS - 1}.get(target.quantity, 1)


_Found = tuple[Choice, float, float | None]  # density, perplexity over dense


def _for_density(found: Statistics, density: float, progress: Progress) -> _Found:
    """The choice with the least measured loss at a density."""
    least = {rule: _floor(found, rule) for rule in found.curves}
    choices = [
        choice for choice in found.choices if least[choice.rule] <= density
    ]  # one rule may reach lower than the other
    if not choices:
        raise unreachable(density, min(least.values()), f" for {found.phase}")
    measured = [(_measured(found, choice, density, progress), choice) for choice in choices]
    over, choice = min(measured)
    return choice, density, over


def _for_loss(found: Statistics, over: float, progress: Progress) -> _Found:
    """The least density whose measured perplexity is within the target: of the first choice, then of the best one there."""

    def measure(choice: Choice, density: float) -> float:
        return _measured(found, choice, density, progress)

    first, *others = found.choices
    density, reached = _least_density(found, first, functools.partial(measure, first), over)
    here, choice = min([(reached, first), *((measure(choice, density), choice) for choice in others)])
    if choice == first:
        return first, density, reached
    less, now = _least_density(found, choice, functools.partial(measure, choice), over, most=density)
    return choice, less, here if less == density else now


def _measured(found: Statistics, choice: Choice, density: float, progress: Progress) -> float:
    over = found.over(choice, density)
    progress(f"{choice} at {density:.1%} of the blocks: {over:+.2%} over dense")
    return over


def _for_kept_mass(found: Statistics, mass: float, progress: Progress) -> _Found:
    """The rule with the least density that keeps an attention mass, by the curves alone."""
    results = []
    for choice in (choice for choice in found.choices if choice.caution == found.choices[0].caution):

        def missed(density: float, choice: Choice = choice) -> float:
            return 1 - found.kept_mass(choice.rule, found.levels(choice, density))

        results.append((_least_density(found, choice, missed, 1 - mass)[0], choice))
    density, choice = min(results)
    progress(f"{choice} at {density:.1%} of the blocks")
    return choice, density, None


def _least_density(
    found: Statistics, choice: Choice, measure: Callable[[float], float], target: float, *, most: float = 1.0
) -> tuple[float, float]:
    """The least density up to `most` at which a quantity that falls with it is at most `target`, and the quantity there."""
    low, high, reached = _floor(found, choice.rule), most, 0.0
    for _ in range(SEARCH_STEPS):
        middle = math.sqrt(low * high)
        if (now := measure(middle)) <= target:
            high, reached = middle, now
        else:
            low = middle
    return high, reached


def _floor(found: Statistics, rule: str, curves: Mapping[str, Curves] | None = None) -> float:
    """The least density of a rule."""
    shares = np.array((found.curves if curves is None else curves)[rule].density)
    shares[: found.dense_layers] = 1
    return float(shares.min(-1).mean()) * (1 + 1e-9)

"""Calibration: values of a rule per layer and head that meet a target, chosen on a few windows of text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from seer_jax.calibrate.choose import at_levels, cheapest_levels, one_level
from seer_jax.calibrate.collect import MAX_BLOCKS, collect_curves
from seer_jax.calibrate.levels import GRIDS, Curves
from seer_jax.calibrate.sensitivity import output_gradients
from seer_jax.calibrate.target import Quantity, Target
from seer_jax.evaluate.levels import Phase, gates_by_phase
from seer_jax.evaluate.scoring import score_prompts, score_windows
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import RankingPolicy, Threshold, TopK
from seer_jax.selection.scorers import LearnedGate, Scorer

SEARCH_STEPS = 8  # of a density whose loss or kept mass is to meet a target
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

    See the README of this folder for the method. One backward and one forward pass over each window; with several rules, or a target
    loss, some sparse passes more.

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
    rule, density, over = search[target.quantity](found, target.value, progress)
    levels = found.levels(rule, density)
    real = found.density(rule, levels)
    return Calibration(
        phase,
        target,
        found.policy(rule, levels),
        real,
        found.kept_mass(rule, levels),
        over,
        found.length,
        found.rivals(real),
    )


def check_windows(length: int, block_size: int) -> None:
    """Raises ValueError where windows of `length` tokens can't be calibrated on."""
    if length % block_size or not 2 <= length // block_size <= MAX_BLOCKS:
        raise ValueError(
            f"`length`, the tokens of a calibration window, must be a multiple of the block size {block_size}, from {2 * block_size} to "
            f"{MAX_BLOCKS * block_size}; got {length}."
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the calibration windows say, and policies made of it.

    Attributes:
      curves: by rule, `[L, heads, N]`, mean over windows.
      dense_layers: the first layers, which the gate leaves dense.
      others: as in `calibrate`.
    """

    model: Transformer
    windows: Int[np.ndarray, "n T"]
    phase: Phase
    scorer: Scorer
    curves: Mapping[str, Curves]
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
        model.segments(probe, gate, config.num_heads if phase is Phase.PREFILL else config.num_kv_heads)
        check_windows(windows.shape[1], probe.tokens_per_block(gate))
        total: dict[str, Curves] = {}
        for number, window in enumerate(windows, 1):
            tokens = jnp.asarray(window, jnp.int32)[None]
            gradients = output_gradients(model, tokens)
            found = jax.device_get(collect_curves(model, tokens, gradients, scorer, phase=phase, rules=tuple(rules)))
            share = jax.tree.map(lambda x: np.asarray(x, np.float64) / len(windows), found)
            total = share if not total else jax.tree.map(np.add, total, share)
            progress(f"window {number} of {len(windows)}")
        return cls(model, windows, phase, scorer, total, probe.dense_first_layers(gate))

    @property
    def length(self) -> int:
        """T."""
        return self.windows.shape[1]

    def levels(self, rule: str, density: float) -> Int[np.ndarray, "L heads"]:
        """See `cheapest_levels`."""
        return cheapest_levels(self.curves[rule], density, dense_layers=self.dense_layers)

    def density(self, rule: str, levels: Int[np.ndarray, "L heads"]) -> float:
        """Share of the visible blocks that these levels keep."""
        return at_levels(self.curves[rule].density, levels, dense_layers=self.dense_layers, dense=1)

    def kept_mass(self, rule: str, levels: Int[np.ndarray, "L heads"]) -> float:
        """Share of the attention mass that these levels keep."""
        return 1 - at_levels(self.curves[rule].missed, levels, dense_layers=self.dense_layers, dense=0)

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

    def over(self, policy: Policy) -> float:
        """Measured perplexity over that of dense attention, minus 1, on the windows."""
        return math.expm1(float(np.mean(losses(self.model, self.windows, policy, self.phase)[0] - self._dense)))

    @functools.cached_property
    def _dense(self) -> Float[np.ndarray, "n"]:
        return losses(self.model, self.windows, Dense(), self.phase)[0]

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
    found = [jax.device_get(score(model, jnp.asarray(window, jnp.int32)[None], policy)) for window in windows]
    return np.array([x.nll.mean(dtype=np.float64) for x in found]), np.array([float(x.kept.mean()) for x in found])


def by_list(model: Transformer, policy: Policy, phase: Phase) -> Policy:
    """The policy with every value as `[L, heads]`, so that policies of one rule share a compiled program."""
    config = model.config
    shape = config.num_layers, config.num_heads if phase is Phase.PREFILL else config.num_kv_heads
    values = {name: np.broadcast_to(np.float32(getattr(policy, name)), shape) for name in policy.per_head}
    return dataclasses.replace(policy, **values) if values else policy


def num_steps(target: Target, rules: Sequence[str], windows: int) -> int:
    """How often `calibrate` calls `progress`, at most."""
    searched = {
        Quantity.DENSITY: len(rules) if len(rules) > 1 else 0,
        Quantity.OVER: len(rules) * SEARCH_STEPS + len(rules) - 1,
        Quantity.KEPT_MASS: 1,
    }
    return windows + searched[target.quantity]


_Found = tuple[str, float, float | None]  # rule, density, perplexity over dense


def _for_density(found: Statistics, density: float, progress: Progress) -> _Found:
    """The rule with the least measured loss at a density."""
    if len(found.curves) == 1:
        return next(iter(found.curves)), density, None
    measured: list[tuple[float, str]] = []
    for rule in found.curves:
        measured.append((found.over(found.policy(rule, found.levels(rule, density))), rule))
        progress(f"{rule}: +{measured[-1][0]:.2%} of dense perplexity")
    over, rule = min(measured)
    return rule, density, over


def _for_loss(found: Statistics, over: float, progress: Progress) -> _Found:
    """The rule with the least density whose measured perplexity is within the target."""

    def measure(rule: str, density: float) -> float:
        rise = found.over(found.policy(rule, found.levels(rule, density)))
        progress(f"{rule} at {density:.1%} of the blocks: +{rise:.2%} of dense perplexity")
        return rise

    return _least_density(found, measure, over)


def _for_kept_mass(found: Statistics, mass: float, progress: Progress) -> _Found:
    """The rule with the least density that keeps an attention mass, by the curves alone."""

    def missed(rule: str, density: float) -> float:
        return 1 - found.kept_mass(rule, found.levels(rule, density))

    rule, density, _ = _least_density(found, missed, 1 - mass)
    progress(f"{rule} at {density:.1%} of the blocks")
    return rule, density, None


def _least_density(found: Statistics, measure: Callable[[str, float], float], most: float) -> _Found:
    """The rule and the least density at which a quantity that falls with it is at most `most`."""
    best, chosen, value = 1.0, next(iter(found.curves)), 0.0
    for number, rule in enumerate(found.curves):
        low, high, reached = _floor(found, rule), best, value
        # A rule that misses the target at the density of an earlier one needs more blocks than that one.
        if number and (low >= high or (reached := measure(rule, high)) > most):
            continue
        for _ in range(SEARCH_STEPS):
            middle = math.sqrt(low * high)
            if (now := measure(rule, middle)) <= most:
                high, reached = middle, now
            else:
                low = middle
        best, chosen, value = high, rule, reached
    return chosen, best, value


def _floor(found: Statistics, rule: str) -> float:
    """The least density of a rule."""
    shares = np.array(found.curves[rule].density)
    shares[: found.dense_layers] = 1
    return float(shares.min(-1).mean()) * (1 + 1e-9)

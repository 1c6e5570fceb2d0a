"""Scores of one method at one level: what each window and prompt gave, and estimates with standard errors made of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.scoring import perplexity
from seer_jax.evaluate.statistics.intervals import Estimate, Interval, estimate_mean, interval_of_mean
from seer_jax.selection.scorers import SCORERS

ESTIMATORS = {
    "perplexity": "exp of the mean loss per token. Standard error: perplexity times the standard error of that mean, with windows as "
    "the independent draws (the losses within a window are not): sample deviation of the windows' mean losses / sqrt(windows)",
    "over_dense": "perplexity over that of dense attention in the same phase, less 1: exp of the mean over windows of each window's "
    "difference in mean loss, less 1. Paired by token, with windows as clusters. 95% interval: exp(mean +- t * sample deviation of the "
    "windows' differences / sqrt(windows)) - 1, t being Student's quantile for windows - 1 degrees of freedom",
    "passkey": "share of the prompts whose answer is right. Standard error: sample deviation of the prompts' outcomes (0 or 1) / sqrt(prompts)",
    "passkey_tokens": "mean over prompts of the share of right answer tokens. Standard error: sample deviation / sqrt(prompts)",
    "passkey_worst": "smallest of the shares of right answers by the depth of the key, and the first depth that has it",
    "blocks_needed": "share of the blocks at which over_dense meets the target: losses of the levels of one rule, made monotone by isotonic "
    "regression in the order of kept and interpolated linearly in asinh(10 loss / target). The ends of the interval are where the lower and "
    "the upper ends of the levels' 95% intervals, treated alike, meet the target",
    "kept": "kept blocks over visible ones in a window, mean over windows and layers. Standard error: sample deviation of the windows' "
    "shares / sqrt(windows)",
}


ScoreKey = tuple[Phase, str | None, str]  # see `Score.key`


@dataclasses.dataclass(frozen=True)
class WindowScore:
    """One window of text.

    Attributes:
      loss: mean -log p of its scored tokens, nats.
      kept: kept blocks over visible ones, summed over the window's rows (prefill) or tokens (decode); mean over layers.
    """

    loss: float
    kept: float


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """One pass-key prompt.

    Attributes:
      depth: where the key is stated, as a share of the text before the question.
      found: whether greedy decoding gives exactly the answer.
      right: share of the answer's single tokens that are right, given the right ones before.
      kept: as in `WindowScore`; for decode mean over the appended tokens of each one's share.
    """

    depth: float
    found: bool
    right: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of one method at one level.

    Attributes:
      phase: what was sparse.
      method: name of the scorer; None: dense attention.
      level: name of the level; "dense" for dense attention.
      windows, prompts: results row by row.
      tokens: number of the windows' tokens that were scored: all but the first of each.
      seconds: duration of the measurement, compilation included.
      policy: the policy that ran, as JSON (`seer_jax.selection.notation.policy_to_json`).
    """

    phase: Phase
    method: str | None
    level: str
    windows: tuple[WindowScore, ...]
    prompts: tuple[PromptScore, ...]
    tokens: int
    seconds: float
    policy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"rule": "dense"})

    @property
    def key(self) -> ScoreKey:
        """What tells the scores of a comparison apart."""
        return self.phase, self.method, self.level

    @property
    def title(self) -> str:
        """Title of the method in tables."""
        return "dense" if self.method is None else SCORERS[self.method].title

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Perplexity, passkey, passkey_tokens and kept with their standard errors, see `ESTIMATORS`."""
        loss, error = estimate_mean([w.loss for w in self.windows])
        ppl = perplexity(np.asarray(loss))
        return {
            "perplexity": Estimate(ppl, ppl * error),
            "passkey": estimate_mean([p.found for p in self.prompts]),
            "passkey_tokens": estimate_mean([p.right for p in self.prompts]),
            "kept": estimate_mean([window.kept for window in self.windows]),
        }

    @property
    def perplexity(self) -> float:
        """On the text windows."""
        return self.estimates["perplexity"].value

    @property
    def passkey(self) -> float:
        """Share of the pass-key prompts whose answer greedy decoding gets exactly right; NaN without prompts."""
        return self.estimates["passkey"].value

    @property
    def passkey_tokens(self) -> float:
        """Share of the answers' single tokens that are right."""
        return self.estimates["passkey_tokens"].value

    @property
    def kept(self) -> float:
        """Measured share of the visible blocks that attention read, mean over windows and layers."""
        return self.estimates["kept"].value

    @property
    def passkey_by_depth(self) -> dict[float, Estimate]:
        """Share of the prompts that are answered right, by the depth of the key."""
        found: dict[float, list[float]] = {}
        for prompt in self.prompts:
            found.setdefault(prompt.depth, []).append(prompt.found)
        return {depth: estimate_mean(sample) for depth, sample in sorted(found.items())}

    @property
    def passkey_worst(self) -> tuple[float, Estimate] | None:
        """The depth at which the fewest keys are found, the first of them, and the share there; None without prompts."""
        return min(self.passkey_by_depth.items(), key=lambda depth: depth[1].value, default=None)


def perplexity_over(first: Score, second: Score) -> Interval:
    """By what share the first perplexity exceeds the second: exp(mean difference of the windows' losses) - 1.

    Both scores are of the same tokens, so that what makes a window hard for both cancels. The interval takes the windows' differences
    as independent draws.

    Raises:
      ValueError: they have different numbers of windows.
    """
    mean, low, high = interval_of_mean(loss_differences(first, second))
    with np.errstate(over="ignore"):
        return Interval(*(float(np.expm1(x)) for x in (mean, low, high)))


def loss_differences(first: Score, second: Score) -> list[float]:
    """Of each window, in nats per token."""
    if len(first.windows) != len(second.windows):
        raise ValueError(
            f"Scores must be of the same windows to be compared; got {len(first.windows)} and {len(second.windows)} windows."
        )
    return [a.loss - b.loss for a, b in zip(first.windows, second.windows, strict=True)]


def passkey_difference(first: Score, second: Score) -> Interval:
    """By how much the first share of pass keys exceeds the second, with the interval of the prompts' differences."""
    return interval_of_mean([float(a.found) - b.found for a, b in zip(first.prompts, second.prompts, strict=True)])


def dense_of(score: Score, scores: Sequence[Score]) -> Score | None:
    """The score of dense attention in the same phase; None where there is none."""
    return next((one for one in scores if one.method is None and one.phase is score.phase), None)


def score_to_json(score: Score, dense: Score | None = None) -> dict[str, Any]:
    """One object of scores.json: the fields of `Score`, estimates with standard errors, and what depth and windows say.

    Args:
      score: what is written.
      dense: dense attention in the same phase; None: `over_dense` is null.

    Returns:
      phase, method, level, policy; perplexity, passkey, passkey_tokens and kept, each with its `_stderr`; `over_dense` (value, low, high);
      `passkey_by_depth` (value, stderr of each depth) and `passkey_worst` (depth, value, stderr); tokens, seconds; `windows` (loss, kept)
      and `prompts` (depth, found, right, kept), row by row. NaN and infinity become None. `ESTIMATORS` says how they are made.
    """
    estimates = {}
    for name, (value, stderr) in score.estimates.items():
        estimates |= {name: value, f"{name}_stderr": stderr}
    by_depth = {f"{depth:g}": of._asdict() for depth, of in score.passkey_by_depth.items()}
    worst = (
        None if score.passkey_worst is None else {"depth": score.passkey_worst[0], **score.passkey_worst[1]._asdict()}
    )
    over = None if dense is None else perplexity_over(score, dense)._asdict()
    rows = {name: [dataclasses.asdict(row) for row in getattr(score, name)] for name in ("windows", "prompts")}
    facts = dict(phase=score.phase.value, method=score.method, level=score.level, policy=dict(score.policy))
    depths = {"passkey_by_depth": by_depth, "passkey_worst": worst}
    counts = {"tokens": score.tokens, "seconds": score.seconds}
    return to_json(facts | estimates | {"over_dense": over} | depths | counts | rows)


def score_from_json(values: Mapping[str, Any]) -> Score:
    """The score that `score_to_json` wrote.

    Raises:
      ValueError: it is none.
    """
    try:
        method, level, policy = values["method"], values["level"], values["policy"]
        if not isinstance(method, str | None) or not isinstance(level, str) or not isinstance(policy, Mapping):
            raise TypeError(f"method {method!r}, level {level!r}")
        return Score(
            phase=Phase(values["phase"]),
            method=method,
            level=level,
            windows=tuple(WindowScore(_number(w["loss"]), _number(w["kept"])) for w in values["windows"]),
            prompts=tuple(
                PromptScore(_number(p["depth"]), bool(p["found"]), _number(p["right"]), _number(p["kept"]))
                for p in values["prompts"]
            ),
            tokens=int(values["tokens"]),
            seconds=_number(values["seconds"]),
            policy=policy,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"A score must have the fields that seer-jax eval writes; got one that has not ({type(error).__name__}: {error})."
        ) from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def to_json(value: Any) -> Any:
    """The value without the numbers that JSON does not have: None in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: to_json(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

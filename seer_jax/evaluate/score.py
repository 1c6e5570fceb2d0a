"""Scores of one method at one level: what each window and prompt gave, and estimates with standard errors made of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.scoring import perplexity
from seer_jax.selection.scorers import SCORERS

ESTIMATORS = {
    "perplexity": "exp of the mean loss per token. Standard error: perplexity times the standard error of that mean, with windows as "
    "the independent draws (the losses within a window are not): sample deviation of the windows' mean losses / sqrt(windows)",
    "passkey": "share of the prompts whose answer is right. Standard error: sample deviation of the prompts' outcomes (0 or 1) / sqrt(prompts)",
    "passkey_tokens": "mean over prompts of the share of right answer tokens. Standard error: sample deviation / sqrt(prompts)",
    "kept": "mean over rows (windows and prompts) and layers. Standard error: sample deviation of the rows' shares / sqrt(rows)",
}


class Estimate(NamedTuple):
    """A mean of a sample and its standard error; NaN where the sample is too small for one."""

    value: float
    stderr: float


def estimate_mean(sample: Sequence[float]) -> Estimate:
    """Mean and sample deviation / sqrt(n) of n independent draws.

    >>> estimate_mean([1.0, 0.0, 1.0, 1.0])
    Estimate(value=0.75, stderr=0.25)
    """
    values = np.asarray(sample, np.float64)
    mean = float(values.mean()) if len(values) else math.nan
    return Estimate(mean, float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


@dataclasses.dataclass(frozen=True)
class WindowScore:
    """One window of text.

    Attributes:
      loss: mean -log p of its scored tokens, nats.
      kept: share of the visible blocks that attention read, mean over layers (and steps, while decoding).
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
      kept: as in `WindowScore`.
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
      tokens: number of the windows' tokens that were scored, the same in each window.
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
    def key(self) -> tuple[Phase, str | None, str]:
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
            "kept": estimate_mean([row.kept for row in (*self.windows, *self.prompts)]),
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
        """Measured share of the visible blocks that attention read, mean over rows and layers."""
        return self.estimates["kept"].value

    @property
    def passkey_by_depth(self) -> dict[float, Estimate]:
        """Share of the prompts that are answered right, by the depth of the key."""
        found: dict[float, list[float]] = {}
        for prompt in self.prompts:
            found.setdefault(prompt.depth, []).append(prompt.found)
        return {depth: estimate_mean(sample) for depth, sample in sorted(found.items())}


def perplexity_difference(first: Score, second: Score) -> Estimate:
    """By how much the first perplexity exceeds the second.

    The error is that of the windows' differences: both scores are of the same windows, whose own spread cancels.
    """
    means = [score.perplexity for score in (first, second)]
    pairs = zip(first.windows, second.windows, strict=True)
    error = estimate_mean([means[0] * a.loss - means[1] * b.loss for a, b in pairs]).stderr
    return Estimate(means[0] - means[1], error)


def passkey_difference(first: Score, second: Score) -> Estimate:
    """By how much the first share of pass keys exceeds the second, with the error of the prompts' differences."""
    return estimate_mean([float(a.found) - b.found for a, b in zip(first.prompts, second.prompts, strict=True)])


def score_to_json(score: Score) -> dict[str, Any]:
    """One object of scores.json: estimates with standard errors, pass keys by depth, and the rows. NaN and infinity become None."""
    estimates = {}
    for name, (value, stderr) in score.estimates.items():
        estimates |= {name: value, f"{name}_stderr": stderr}
    by_depth = {f"{depth:g}": of._asdict() for depth, of in score.passkey_by_depth.items()}
    rows = {name: [dataclasses.asdict(row) for row in getattr(score, name)] for name in ("windows", "prompts")}
    facts = dict(phase=score.phase.value, method=score.method, level=score.level, policy=dict(score.policy))
    return _plain(
        facts | estimates | {"passkey_by_depth": by_depth, "tokens": score.tokens, "seconds": score.seconds} | rows
    )


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


def _plain(value: Any) -> Any:
    """Without the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

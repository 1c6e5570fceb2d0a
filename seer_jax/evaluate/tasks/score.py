"""Scores of tasks under policies: what each sample gave, means with standard errors, and paired differences."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer_jax.evaluate.record import Record
from seer_jax.evaluate.statistics.intervals import Estimate, Interval, estimate_mean, interval_of_means
from seer_jax.evaluate.tasks.base import TaskPhase
from seer_jax.evaluate.tasks.table import Figures, legend, title
from seer_jax.outputs import write_json

ESTIMATORS = {
    "score": "mean score of the samples, by the task's metric. Standard error: sample deviation / sqrt(samples)",
    "over_dense": "mean over samples of score - score of dense attention on the same sample. 95% interval (low, high): mean +- t * sample "
    "deviation of the differences / sqrt(samples), t being Student's quantile for samples - 1 degrees of freedom; of a mean over tasks, with "
    "the degrees of freedom of Welch and Satterthwaite",
    "kept": "mean over samples and layers of the share of visible blocks that attention read in the phase. Standard error: sample "
    "deviation / sqrt(samples)",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One sample under one policy.

    Attributes:
      score: by the task's metric.
      kept: share of the visible blocks that attention read in the sparse phase, mean over layers (and steps, while decoding); of the prompt
        where both phases are sparse.
      prediction: what the model wrote; None where a harness keeps it.
      answers: what the prediction was held against.
      depth: see `Sample`.
      kept_decode: share that decoding read, where both phases are sparse.
    """

    score: float
    kept: float
    prediction: str | None = None
    answers: tuple[str, ...] = ()
    depth: float | None = None
    kept_decode: float | None = None


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Result of one task under one policy.

    Attributes:
      task: name of the task, for one of lm-evaluation-harness with its metric behind a comma.
      phase: what was sparse; None: nothing.
      method: name of the scorer, or of those of both phases, joined by "+"; None: dense attention.
      level: name of the level; "dense" for dense attention.
      outcomes: sample by sample.
      seconds: duration of the measurement, compilation included.
      policy: the policy that ran, as JSON (`seer_jax.selection.notation.policy_to_json`), or those of both phases by their names.
      is_share: whether the score is a share, from 0 to 1, and higher is better.
      asked: name that the task was asked by, where it stands for several scores; None: that of the task.
    """

    task: str
    phase: TaskPhase | None
    method: str | None
    level: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    policy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"rule": "dense"})
    is_share: bool = True
    asked: str | None = None

    @property
    def unit(self) -> tuple[str, TaskPhase | None, str | None, str]:
        """What is measured in one go: the task that was asked for, and the policy."""
        return self.asked or self.task, *self.policy_key

    @property
    def key(self) -> tuple[str, TaskPhase | None, str | None, str]:
        """What tells the scores of an evaluation apart."""
        return self.task, self.phase, self.method, self.level

    @property
    def policy_key(self) -> tuple[TaskPhase | None, str | None, str]:
        """What scores of several tasks under one policy share."""
        return self.key[1:]

    @property
    def score(self) -> Estimate:
        """Mean over the samples."""
        return estimate_mean([outcome.score for outcome in self.outcomes])

    @property
    def kept(self) -> Estimate:
        """Share of the blocks that attention read, mean over the samples."""
        return estimate_mean([outcome.kept for outcome in self.outcomes])

    @property
    def kept_decode(self) -> Estimate | None:
        """Share of the blocks that decoding read, where both phases are sparse; otherwise None."""
        shares = [outcome.kept_decode for outcome in self.outcomes if outcome.kept_decode is not None]
        return estimate_mean(shares) if shares else None


def difference(*pairs: tuple[TaskScore, TaskScore]) -> Interval:
    """By how much the first score of a pair exceeds the second, with the 95% interval of the samples' differences; the mean of several pairs.

    Raises:
      ValueError: the scores of a pair are of different samples.
    """
    samples = [list(zip(first.outcomes, second.outcomes, strict=True)) for first, second in pairs]
    return interval_of_means([[a.score - b.score for a, b in sample] for sample in samples])


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, each of the same weight.

    >>> mean_of([Estimate(1.0, 0.3), Estimate(0.5, 0.4)])
    Estimate(value=0.75, stderr=0.25)
    """
    values, errors = zip(*estimates, strict=True)
    return Estimate(sum(values) / len(values), math.hypot(*errors) / len(errors))


def figures(scores: Sequence[TaskScore]) -> list[Figures]:
    """One line of a table for each score: dense attention first in each task, then a mean over tasks where there are several."""
    lines, dense = [], {score.task: score for score in scores if score.method is None}
    for task in dict.fromkeys(score.task for score in scores):
        for one in (score for score in scores if score.task == task):
            over = None if one.method is None or task not in dense else difference((one, dense[task]))
            lines.append(
                Figures(
                    task,
                    title(one.method),
                    one.level,
                    one.phase,
                    one.score,
                    over,
                    one.kept,
                    one.is_share,
                    one.kept_decode,
                )
            )
    return lines + _means(scores, dense)


def _means(scores: Sequence[TaskScore], dense: Mapping[str, TaskScore]) -> list[Figures]:
    """Means over the tasks whose scores are shares, for the policies under which all of them were measured."""
    tasks = [task for task, score in dense.items() if score.is_share]
    lines = []
    if len(tasks) < 2:
        return lines
    for key in dict.fromkeys(score.policy_key for score in scores):
        ours = {score.task: score for score in scores if score.policy_key == key and score.task in tasks}
        if len(ours) == len(tasks):
            phase, method, level = key
            over = None if method is None else difference(*((ours[task], dense[task]) for task in tasks))
            score, kept = (mean_of([getattr(ours[task], name) for task in tasks]) for name in ("score", "kept"))
            later = [one.kept_decode for one in ours.values() if one.kept_decode is not None]
            decode = mean_of(later) if later else None
            name = f"mean of {len(tasks)} tasks"
            lines.append(Figures(name, title(method), level, phase, score, over, kept, kept_decode=decode))
    return lines


class TaskRecord(Record):
    """tasks.json of one evaluation, which an interrupted one goes on from; `scores` holds `TaskScore`s."""

    def parse(self, values: Sequence[Any]) -> list[Any]:
        return [score_from_json(score) for score in values]

    def write(self, facts: Mapping[str, Any]) -> None:
        write_task_scores(self.path, self.scores, **facts)


def write_task_scores(path: Path, scores: Sequence[TaskScore], **facts: Any) -> None:
    """Writes JSON in one step: the facts, `legend`, `estimators`, `scores` with one object each, and `means` over tasks; NaN becomes null."""
    dense = {score.task: score for score in scores if score.method is None}
    rows = [score_to_json(score, dense.get(score.task)) for score in scores]
    means = [_mean_to_json(line) for line in _means(scores, dense)]
    write_json(
        path,
        _plain({**facts, "legend": legend(figures(scores)), "estimators": ESTIMATORS, "scores": rows, "means": means}),
    )


def _mean_to_json(line: Figures) -> dict[str, Any]:
    facts = {"task": line.task, "phase": line.phase, "method": line.title, "level": line.level}
    return facts | _estimates(line.over_dense, score=line.score, kept=line.kept, kept_decode=line.kept_decode)


def _estimates(over_dense: Interval | None, **estimates: Estimate | None) -> dict[str, Any]:
    values = {name: None if of is None else of.value for name, of in estimates.items()}
    values |= {f"{name}_stderr": None if of is None else of.stderr for name, of in estimates.items()}
    return values | {"over_dense": None if over_dense is None else over_dense._asdict()}


def score_to_json(score: TaskScore, dense: TaskScore | None = None) -> dict[str, Any]:
    """One object of tasks.json: estimates with standard errors, and the samples."""
    over = None if dense is None or score.method is None else difference((score, dense))
    estimates = _estimates(over, score=score.score, kept=score.kept, kept_decode=score.kept_decode)
    facts = {
        name: getattr(score, name) for name in ("task", "phase", "method", "level", "is_share", "asked", "seconds")
    }
    outcomes = [dataclasses.asdict(outcome) for outcome in score.outcomes]
    return _plain({**facts, "policy": dict(score.policy), **estimates, "samples": outcomes})


def score_from_json(values: Any) -> TaskScore:
    """The score that `score_to_json` wrote.

    Raises:
      ValueError: it is none.
    """
    try:
        return TaskScore(
            task=values["task"],
            phase=None if values["phase"] is None else TaskPhase(values["phase"]),
            method=values["method"],
            level=values["level"],
            outcomes=tuple(
                Outcome(
                    _number(o["score"]),
                    _number(o["kept"]),
                    o["prediction"],
                    tuple(o["answers"]),
                    o["depth"],
                    o.get("kept_decode"),
                )
                for o in values["samples"]
            ),
            seconds=values["seconds"],
            policy=values["policy"],
            is_share=values["is_share"],
            asked=values["asked"],
        )
    except Exception as error:  # of beartype too, where values have other types
        raise ValueError(
            f"A score of a task must have the fields that seer-jax eval writes; got one that has not ({type(error).__name__}: {error})."
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

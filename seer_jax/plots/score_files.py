"""Scores of evaluations, read from their scores.json, by experiment: one model on one text."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.score import Score, score_from_json
from seer_jax.text_files import parse_json, read_text

WRITER = "Name a file that seer-jax eval --output FOLDER wrote."


@dataclasses.dataclass(frozen=True)
class GatedScore:
    """A score, and the gates of its evaluation as a reader tells them apart."""

    score: Score
    gates: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Scores of one model on the same windows of one text.

    Attributes:
      title: model, tokens and text.
      length: tokens of each window; None where the files do not say.
      scores: of all files; where two files have a score of the same method, level and gates, the later file's.
    """

    title: str
    length: int | None
    scores: tuple[GatedScore, ...]

    @property
    def phases(self) -> list[Phase]:
        """Those with scores besides dense attention, in the usual order."""
        return [phase for phase in Phase if any(s.score.phase is phase and s.score.method for s in self.scores)]

    def dense(self, phase: Phase) -> Score:
        """Dense attention in a phase.

        Raises:
          ValueError: no file has it.
        """
        for one in self.scores:
            if one.score.phase is phase and one.score.method is None:
                return one.score
        raise ValueError(
            f"{self.title}: the scores must hold dense attention in {phase.value}, to which the others are compared; they do not. {WRITER}"
        )


def read_experiments(paths: Sequence[Path]) -> list[Experiment]:
    """The experiments of one or several files, in their order; files of the same model, text and windows are one experiment.

    Raises:
      OSError: a file can't be read.
      ValueError: a file holds no scores, none but dense ones, or two files of one experiment scored different tokens.
    """
    found: dict[tuple, dict[tuple, GatedScore]] = {}
    facts: dict[tuple, Mapping[str, Any]] = {}
    for path in paths:
        values = read_lists(path, "scores", WRITER)
        key = _identity(values)
        facts.setdefault(key, values)
        scores = found.setdefault(key, {})
        for score in _scores(path, values["scores"]):
            one = GatedScore(score, _gates(values))
            _check_same_tokens(path, score, [x.score for x in scores.values()])
            scores[(*score.key, one.gates if score.method == "gate" else "")] = one
    experiments = [Experiment(_title(facts[key]), _length(facts[key]), tuple(of.values())) for key, of in found.items()]
    if not any(experiment.phases for experiment in experiments):
        raise ValueError(f"{paths[0]} must hold scores besides dense ones; it holds none. {WRITER}")
    return [experiment for experiment in experiments if experiment.phases]


def read_lists(path: Path, name: str, writer: str) -> dict[str, Any]:
    """The JSON object in a file, which must hold a list of that name.

    Args:
      path: of the file.
      name: of the list.
      writer: what to do where it is not there.

    Raises:
      OSError: the file can't be read.
      ValueError: it holds something else.
    """
    try:
        values = parse_json(read_text(path), str(path))
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}. {writer}") from error
    if not isinstance(values, dict) or not isinstance(values.get(name), list):
        raise ValueError(f"{path} must hold {name!r}, a list; it holds something else. {writer}")
    return values


def _scores(path: Path, values: Sequence[Any]) -> list[Score]:
    try:
        return [score_from_json(score) for score in values]
    except ValueError as error:
        raise ValueError(f"{path} must hold scores that can be read; {error} {WRITER}") from error


def _of(values: Any, *names: str) -> Any:
    """A value within nested objects; None where it is not there."""
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _identity(values: Mapping[str, Any]) -> tuple:
    model = _of(values, "model", "fingerprint") or _of(values, "model", "name")
    return tuple(map(str, (model, _of(values, "text", "sha256"), _length(values), _of(values, "text", "windows"))))


def _length(values: Mapping[str, Any]) -> int | None:
    length = _of(values, "config", "length")
    return length if isinstance(length, int) else None


def _title(values: Mapping[str, Any]) -> str:
    model, text, length = _of(values, "model", "name"), _of(values, "text", "path"), _length(values)
    parts = [Path(str(model)).name if model else None, f"{length} tokens" if length else None]
    return ", ".join(filter(None, [*parts, Path(str(text)).name if text else None])) or "Scores"


def _gates(values: Mapping[str, Any]) -> str:
    """Names of the gates, without the folders above them."""
    gates = _of(values, "gates")
    names = [str(_of(gate, "name")) for gate in gates] if isinstance(gates, list) else []
    return ", ".join("/".join(Path(name).parts[-2:]) for name in names)


def _check_same_tokens(path: Path, score: Score, others: Sequence[Score]) -> None:
    for other in others:
        if other.phase is score.phase and (other.tokens, len(other.windows)) != (score.tokens, len(score.windows)):
            raise ValueError(
                f"{path} must have scored the tokens that the other scores of this model and text are of, {other.tokens} in {score.phase.value}; "
                f"got {score.tokens}. Plot the files one by one, or measure them with the same settings and version."
            )

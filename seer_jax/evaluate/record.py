"""The record of an evaluation, scores.json: all that is needed to repeat it, and the scores, written as they come."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.devices import default_device
from seer_jax.evaluate.levels import JOIN
from seer_jax.evaluate.score import ESTIMATORS, Score, dense_of, score_from_json, score_to_json
from seer_jax.evaluate.statistics.blocks_needed import all_blocks_needed
from seer_jax.evaluate.table import legend
from seer_jax.folders import fingerprint
from seer_jax.outputs import write_json
from seer_jax.selection.scorers import SCORERS

PACKAGES = ("seer-jax", "jax", "jaxlib", "jax-cuda13-plugin")
IDENTITY = "identity"
EXTENDING = (
    "policies",
    "methods",
    "phases",
)  # settings that say what is measured, not how: a record takes further ones
RUN = ("command", "config")  # facts that differ between runs that measure into one file
REMEDY = "Choose another `output`, or pass force=True to start over."
Facts = Mapping[str, Any]


def write_scores(path: Path, scores: Sequence[Score], **facts: Any) -> None:
    """Writes JSON in one step: the facts, `legend`, `estimators`, `blocks_needed` and `scores` with one object each.

    `score_to_json` and `BlocksNeeded.to_json` say what the objects hold.
    """
    rows = [score_to_json(score, dense_of(score, scores)) for score in scores]
    needed = [one.to_json() for one in all_blocks_needed(scores)]
    words = {"legend": legend(scores), "estimators": ESTIMATORS}
    write_json(path, {**facts, **words, "blocks_needed": needed, "scores": rows})


class Record:
    """scores.json of one evaluation, which an interrupted one goes on from, and one with further policies, methods or phases extends.

    A subclass keeps scores of another kind, which have a `key`, by `parse` and `write`.

    Attributes:
      path: of the file.
      scores: that it holds.
    """

    def __init__(self, path: Path, facts: Facts, identity: Facts, *, force: bool = False):
        """
        Args:
          path: of the file.
          facts: for readers, JSON.
          identity: settings and digests that decide the scores, JSON. A file with the same ones is continued; it lists under `earlier`
            command and settings of the runs before this one, where they differ.
          force: start over whatever is there.

        Raises:
          ValueError: the file is of another evaluation, or none.
        """
        self.path, self.scores = path, list[Any]()
        self._facts = {**facts, IDENTITY: json.loads(json.dumps(identity)), "started": _now()}
        if path.exists() and not force:
            values = _read(path)
            _check_same(path, values[IDENTITY], self._facts[IDENTITY])
            self._facts |= {"started": values["started"], "earlier": _earlier(values, self._facts)}
            self.scores = self._checked(values["scores"])

    def parse(self, values: Sequence[Any]) -> list[Any]:
        """The scores that `write` wrote. Raises ValueError where they are none."""
        return [score_from_json(score) for score in values]

    def write(self, facts: Facts) -> None:
        """Writes the file with all scores and some facts."""
        write_scores(self.path, self.scores, **facts)

    def _checked(self, values: Sequence[Any]) -> list[Any]:
        try:
            scores = self.parse(values)
        except ValueError as error:
            raise ValueError(f"{self.path} must hold scores that can be read; {error} {REMEDY}") from error
        methods = (name for score in scores if score.method is not None for name in score.method.split(JOIN))
        if unknown := dict.fromkeys(name for name in methods if name not in SCORERS):
            raise ValueError(
                f"{self.path} must hold scores of registered scorers; got {', '.join(unknown)}. Name their module (--scorers MODULE). {REMEDY}"
            )
        return scores

    def check_policies(self, planned: Iterable[Any]) -> None:
        """Checks that the scores which stand for planned ones are of the same policies: a file of a policy may have changed.

        Args:
          planned: each with phase, method, level and saved policy, as `Measurement` and `TaskPolicy` have them.

        Raises:
          ValueError: one is not.
        """
        policies = {(one.phase, one.method, one.level): one.saved for one in planned}
        for score in self.scores:
            new = json.loads(json.dumps(policies.get((score.phase, score.method, score.level), score.policy)))
            if different := [name for name in {**score.policy, **new} if score.policy.get(name) != new.get(name)]:
                raise ValueError(
                    f"{self.path} must hold scores of the policies that are asked for; {score.phase} {score.method} at {score.level} has "
                    f"another {' and '.join(different)}. Give the policy another name (that of its file). {REMEDY}"
                )

    def add(self, score: Any, *, planned: int) -> None:
        """Keeps a score, unless it is there, and writes the file.

        Args:
          score: the next one.
          planned: number of scores of the whole evaluation; the file says whether it is complete.
        """
        if score.key in {one.key for one in self.scores}:
            return
        self.scores.append(score)
        state = {"updated": _now(), "complete": len(self.scores) >= planned}
        self.write({**self._facts, **state})


def _earlier(values: Mapping[str, Any], facts: Facts) -> list[Any]:
    """Command and settings of the runs that a file has scores of, without those of the run that goes on from it."""
    runs = values.get("earlier")
    runs = [*(runs if isinstance(runs, list) else ()), {name: values.get(name) for name in RUN}]
    settings = json.loads(json.dumps(facts.get("config")))
    return [run for run in runs if isinstance(run, dict) and run.get("config") != settings]


def environment() -> dict[str, Any]:
    """Versions and device, as far as they may change a score or a time."""
    versions, device = {"python": platform.python_version()}, default_device()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": device.device_kind, "platform": device.platform, "versions": versions}


def typed_command(program: str) -> str:
    """The command line of this process, as it can be typed again."""
    return shlex.join([program, *sys.argv[1:]])


def describe_file(path: Path) -> dict[str, Any]:
    """Path, size and digest of a file."""
    data = path.read_bytes()
    return {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe_folder(name: str, folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Name, revision on the hub if it has one, and `fingerprint` of a model or gate.

    Args:
      name: as the user gave it.
      folder: that it stands for, or its GGUF file.
      patterns: of the files that count.
    """
    revision = folder.name if folder.parent.name == "snapshots" else None  # the layout of the hub's cache
    return {"name": name, "revision": revision, "fingerprint": fingerprint(folder, patterns)}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold the scores of an evaluation; it is no JSON ({error}). {REMEDY}") from error
    if not isinstance(values, dict) or not all(
        isinstance(values.get(name), kind) for name, kind in ((IDENTITY, dict), ("started", str), ("scores", list))
    ):
        raise ValueError(
            f"{path} must hold the scores of an evaluation that can go on; it holds something else. {REMEDY}"
        )
    return values


def _check_same(path: Path, old: Any, new: Any) -> None:
    if different := list(_differences(old, new)):
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"{path} holds scores of another evaluation: {', '.join(different[:3])}{more}. Repeat its settings to go on from it, choose "
            "another `output`, or pass force=True to start over."
        )


def _differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{place}.{name}" if place else name)
    elif old != new:
        yield f"{place} was {json.dumps(old)}, now {json.dumps(new)}"

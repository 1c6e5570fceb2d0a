"""The stages of the extension, one after the other; what they took and found is kept as it comes."""

import json
import time
from collections.abc import Callable
from typing import Any

from seer_jax.folder_lock import locked
from seer_jax.outputs import check_output_folder, write_json
from seer_jax.smollm2.extension.config import ExtensionConfig, Stage
from seer_jax.smollm2.extension.measuring import EXTENDED, Measuring
from seer_jax.smollm2.extension.table import FACTS, write_results
from seer_jax.smollm2.extension.training import train, train_from_scratch

NEEDS = {Stage.GATES: (Stage.YARN,), Stage.DISTIL: (Stage.YARN, Stage.GATES)}


def run_extension(config: ExtensionConfig, say: Callable[[str], None]) -> None:
    """Runs the stages that are asked for, and writes results and table after each.

    Raises:
      FileNotFoundError: a text is not there, or a stage needs another one first.
      OSError: the output can't be written.
      ValueError, MemoryError, FloatingPointError: see `distill`, `finetune`, `calibrate` and `compare`.
      KeyboardInterrupt, SystemExit: the process was asked to stop; what is finished is kept.
    """
    for path in (config.train, config.held_out):
        if not path.exists():
            raise FileNotFoundError(f"The extension needs its texts; {path} is not there. Name files that are.")
    check_output_folder(config.output)
    with locked(config.output):
        facts, measuring = Facts(config), Measuring(config)
        for stage in config.stages:
            if missing := [needed for needed in NEEDS.get(stage, ()) if not facts.finished(needed)]:
                raise FileNotFoundError(f"Stage {stage} needs stage {missing[0]}, which is not finished. Run it first.")
            facts.run(stage, lambda stage=stage: _run(stage, facts, measuring, lambda line: say(f"[{stage}] {line}")))
            say(f"[{stage}] {facts.of(stage)['seconds']:.0f} s in all")
        say(write_results(config.output))


def _run(stage: Stage, facts: "Facts", measuring: Measuring, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a stage; returns what the results say of it."""
    if stage is Stage.SCRATCH:
        return train_from_scratch(measuring.config, say)
    if stage not in (Stage.CALIBRATE, Stage.SCORE):
        return {"tokens": train(measuring.config, stage, say)}
    work = measuring.calibrate if stage is Stage.CALIBRATE else measuring.score
    there = [name for name, extended in EXTENDED.items() if extended.is_there(facts.finished)]
    if not there:
        raise FileNotFoundError(
            f"Stage {stage} needs a model to measure; none is finished. Run {Stage.YARN} and {Stage.GATES}, or {Stage.JOINT}, first."
        )
    for name in there:
        work(name, lambda line, name=name: say(f"{name}: {line}"))
    return {"models": there}


class Facts:
    """What stages took and found: OUTPUT/facts.json, by stage `seconds` of all runs, `finished`, and what the stage returned."""

    def __init__(self, config: ExtensionConfig):
        self._path = config.output / FACTS
        self._values: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}

    def of(self, stage: Stage) -> dict[str, Any]:
        """The facts of a stage, {} of one that was not run."""
        return self._values.get(stage.value, {})

    def finished(self, stage: Stage) -> bool:
        """Whether a stage has come to its end."""
        return bool(self.of(stage).get("finished"))

    def run(self, stage: Stage, work: Callable[[], dict[str, Any]]) -> None:
        """Runs a stage and writes its facts, also where it is stopped or fails; a stage that refuses its settings stays as it was."""
        begun, found = time.monotonic(), self.of(stage) | {"finished": False}
        try:
            found |= work() | {"finished": True}
        except ValueError:
            found = self.of(stage)
            raise
        finally:
            self._values[stage.value] = found | {"seconds": found.get("seconds", 0.0) + time.monotonic() - begun}
            write_json(self._path, self._values)

"""Calibrated thresholds and scores of the models of the extension, each kept as it comes."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from seer_jax.calibrate import Quantity, Target, calibrate
from seer_jax.evaluate import (
    EvalRows,
    Phase,
    Record,
    SparsityLevel,
    compare,
    load_words,
    parse_level,
    passkey_prompts,
    score_line,
    text_windows,
)
from seer_jax.evaluate.record import describe_file, describe_folder, environment
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import write_json
from seer_jax.selection.notation import policy_from_json, policy_to_json
from seer_jax.selection.rules import RankingPolicy
from seer_jax.selection.scorers import LearnedGate
from seer_jax.smollm2.extension.config import ExtensionConfig, Stage
from seer_jax.text_files import read_text

SCORES = "scores.json"
POLICIES = "policies.json"
CALIBRATED = "calibrated"  # begins the names of levels with calibrated thresholds
MODEL_FILES = ("config.json", "*.safetensors")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Extended:
    """A model with a longer context, and its gate.

    Attributes:
      meaning: of the two, in tables.
      model: stage that writes the model.
      gate: stage that writes the gate.
    """

    meaning: str
    model: Stage
    gate: Stage

    def is_there(self, finished: Callable[[Stage], bool]) -> bool:
        """Whether its stages are finished."""
        return finished(self.model) and finished(self.gate)


EXTENDED = {
    "after": Extended("gates after YaRN", Stage.YARN, Stage.GATES),
    "joint": Extended("YaRN with gates", Stage.JOINT, Stage.JOINT),
    "distilled": Extended("gates after YaRN, then self-distillation", Stage.DISTIL, Stage.DISTIL),
}


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What the measurements of all models share.

    Attributes:
      config: of the extension.
    """

    config: ExtensionConfig

    @functools.cached_property
    def text(self) -> Int[np.ndarray, "n"]:
        """The held-out text as tokens."""
        encoded = load_tokenizer(self.config.model).encode(read_text(self.config.held_out), special_tokens=False)
        return np.array(encoded, np.int32)

    @functools.cached_property
    def windows(self) -> Int[np.ndarray, "n T"]:
        """Windows to calibrate on, and behind them those that are scored."""
        config = self.config
        found = text_windows(self.text, config.length, config.windows + config.calibration_windows)
        if len(found) <= config.calibration_windows:
            raise ValueError(
                f"The held-out text must fill more than the {config.calibration_windows} windows of {config.length} tokens to calibrate "
                f"on; it fills {len(found)}. Use a longer text or a smaller `length`."
            )
        return found

    def rows(self, vocab_size: int) -> EvalRows:
        """Windows and pass-key prompts that are scored."""
        config = self.config
        keys: Any = dict(length=config.length, count=config.passkeys, vocab_size=vocab_size, seed=config.seed)
        prompts = passkey_prompts(load_tokenizer(config.model), self.text, load_words("eval"), **keys)
        return EvalRows(self.windows[config.calibration_windows :], prompts)

    def load(self, name: str) -> Transformer:
        """One of `EXTENDED`, with its gate."""
        model, gate = self._places(name)
        return from_pretrained(model, gate, dtype=self.config.dtype or DType.default())

    def calibrate(self, name: str, say: Say) -> None:
        """Chooses thresholds at each density that has none yet and can be met; each policy is kept as it comes, for this model and these
        windows."""
        path, model, of = self._file(name, POLICIES), None, self._identity(name)
        policies = self._policies(name)
        for density in self.config.densities:
            if (key := f"{CALIBRATED}:{density:g}") in policies:
                continue
            model = model or self.load(name)
            windows, target = self.windows[: self.config.calibration_windows], Target(Quantity.DENSITY, density)
            try:
                found = calibrate(model, windows, target, phase=Phase.PREFILL, rules=("threshold",))
            except ValueError as error:  # short rows, which keep their own blocks, can't be as sparse
                say(f"{key}: {error}")
                continue
            policies[key] = policy_to_json(found.policy)
            write_json(path, {"of": of, "policies": policies})
            say(f"{key}: {found.density:.1%} of the blocks, {found.kept_mass:.1%} of the attention mass")

    def score(self, name: str, say: Say) -> None:
        """Scores a model with dense attention, top-k, and the calibrated thresholds that are there; each score is kept as it comes."""
        model, record = self.load(name), self._record(name)
        levels = [parse_level(f"topk:{density:g}") for density in self.config.densities]
        for key, policy in self._policies(name).items():
            read = policy_from_json(policy)
            assert isinstance(read, RankingPolicy)
            levels.append(SparsityLevel(key, read, (Phase.PREFILL,)))
        there = {score.key for score in record.scores}
        settings: Any = dict(methods=(LearnedGate(),), phases=(Phase.PREFILL,), workers=self.config.workers)
        rows, dense = self.rows(model.config.vocab_size), None
        for score in compare(model, rows, levels, done=tuple(record.scores), **settings):
            dense = dense or score
            if score.key not in there:
                record.add(score, planned=0)
                say(score_line(score, dense))

    def _places(self, name: str) -> tuple[Path, Path]:
        extended = EXTENDED[name]
        return self.config.output / extended.model / "model", self.config.output / extended.gate / "prefill_gate"

    def _file(self, name: str, file: str) -> Path:
        folder = self.config.output / "measured" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / file

    def _policies(self, name: str) -> dict[str, Any]:
        """The calibrated policies of a model that are there, by level; none where they are of another model or other windows."""
        kept = _read(self._file(name, POLICIES))
        return kept["policies"] if kept.get("of") == self._identity(name) else {}

    def _identity(self, name: str) -> dict[str, Any]:
        """The model and the windows, by their digests."""
        config = self.config
        return {
            "model": [describe_folder(str(place), place, MODEL_FILES)["fingerprint"] for place in self._places(name)],
            "text": describe_file(config.held_out)["sha256"],
            "length": config.length,
            "windows": [config.windows, config.calibration_windows],
            "dtype": (config.dtype or DType.default()).value,
        }

    def _record(self, name: str) -> Record:
        """The scores of a model.

        Raises:
          ValueError: those that are there are of another model or other rows.
        """
        config, here = self.config, environment()
        own = {"passkeys": [config.passkeys, config.seed], "device": here["device"], "jax": here["versions"]["jax"]}
        identity = self._identity(name) | own
        facts = {"command": "seer_jax.smollm2.extension", "config": {"model": config.model}, **here}
        return Record(self._file(name, SCORES), facts, identity)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

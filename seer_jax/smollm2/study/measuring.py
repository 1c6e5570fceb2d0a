"""Scores of gates and baselines on the windows of the study, each kept as it comes."""

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from seer_jax.evaluate import (
    EvalRows,
    Phase,
    Record,
    Score,
    SparsityLevel,
    WindowScore,
    compare,
    make_rows,
    parse_level,
    score_line,
    score_prompts,
    score_windows,
)
from seer_jax.evaluate.record import describe_file, describe_folder, environment
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import resolve
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import Threshold
from seer_jax.selection.scorers import LearnedGate, MassOracle, Oracle, Quest, Scorer, XAttention
from seer_jax.smollm2.study.config import StudyConfig
from seer_jax.text_files import read_text

SCORES = "scores.json"
Say = Callable[[str], None]
BASELINE_METHODS: dict[Phase, tuple[Scorer, ...]] = {
    Phase.PREFILL: (Oracle(), MassOracle(), XAttention()),
    Phase.DECODE: (Oracle(), MassOracle(), Quest()),
}
DENSE = "dense"
MODEL_FILES = ("config.json", "*.safetensors", "*.gguf")


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all variants share; each part is made when it is first needed.

    Attributes:
      config: of the study.
    """

    config: StudyConfig

    @functools.cached_property
    def model(self) -> Transformer:
        """The base model, without gates."""
        dtype = self.config.dtype or DType.default()
        return from_pretrained(self.config.model, dtype=dtype)

    @functools.cached_property
    def rows(self) -> EvalRows:
        """The windows."""
        text, vocab_size = read_text(self.config.held_out), self.model.config.vocab_size
        settings: dict[str, Any] = dict(length=self.config.length, windows=self.config.windows, passkeys=0)
        return make_rows(load_tokenizer(self.config.model), text, vocab_size=vocab_size, **settings)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the scores beside the gates, JSON."""
        config, here = self.config, environment()
        model = describe_folder(config.model, resolve(config.model, MODEL_FILES), MODEL_FILES)
        return {
            "model": model["fingerprint"],
            "text": describe_file(config.held_out)["sha256"],
            "length": config.length,
            "windows": len(self.rows.windows),
            "dtype": (config.dtype or DType.default()).value,
            "device": here["device"],
            "jax": here["versions"]["jax"],
        }

    @functools.cached_property
    def dense(self) -> dict[Phase, Score]:
        """Scores of dense attention, which has the same ones in both phases."""
        record = self.record(DENSE)
        settings: dict[str, Any] = dict(phases=tuple(Phase), done=tuple(record.scores))
        for score in compare(self.model, self.rows, (), **settings):
            record.add(score, planned=len(Phase))
        return {score.phase: score for score in record.scores}

    def record(self, *place: str, **of: Any) -> Record:
        """The scores in a folder of the output; `of` is what decides them beside `identity`.

        Raises:
          ValueError: those that are there are of other settings.
        """
        folder = self.config.output.joinpath(*place)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"command": "seer_jax.smollm2.study", "config": {"model": self.config.model}, **environment()}
        return Record(folder / SCORES, facts, self.identity | of)

    def with_gate(self, gate: Any) -> Transformer:
        """The base model with one gate: its programs do not depend on the other one."""
        return nnx.merge(*nnx.split(self.model)).attach(gate)


def ladder(config: StudyConfig, *, top_k: bool = False) -> list[SparsityLevel]:
    """The levels of all rules, those of different rules in turn, as they are different programs."""
    rules = {"threshold": config.thresholds, "mass": config.masses, "topk": config.densities if top_k else ()}
    named = [[f"{rule}:{value:g}" for value in values] for rule, values in rules.items()]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*named))
    return [parse_level(name) for name in turns if name is not None]


def score_methods(
    ground: Ground,
    model: Transformer,
    phase: Phase,
    methods: Sequence[Scorer],
    levels: Sequence[SparsityLevel],
    record: Record,
    say: Say,
) -> None:
    """Scores methods at levels; each score is kept and said as it comes."""
    dense = ground.dense[phase]
    record.add(dense, planned=0)
    there = {score.key for score in record.scores}
    settings: dict[str, Any] = dict(methods=methods, phases=(phase,), workers=ground.config.workers)
    for score in compare(model, ground.rows, levels, done=tuple(record.scores), **settings):
        if score.key not in there:
            record.add(score, planned=0)
            say(score_line(score, dense))


def score_gates(ground: Ground, name: str, gates: dict[Phase, Any], *, top_k: bool, say: Say) -> None:
    """Scores each trained gate of a variant."""
    for phase in ground.config.phases:
        record = ground.record(name, phase.value, gate=_fingerprint(gates[phase]))
        levels = ladder(ground.config, top_k=top_k)
        score_methods(ground, ground.with_gate(gates[phase]), phase, (LearnedGate(),), levels, record, say)


def score_baselines(ground: Ground, name: str, say: Say) -> None:
    """Scores the oracles and the methods that need no training."""
    for phase in ground.config.phases:
        record = ground.record(name, phase.value)
        score_methods(ground, ground.model, phase, BASELINE_METHODS[phase], ladder(ground.config), record, say)


def score_own(
    ground: Ground,
    model: Transformer,
    phase: Phase,
    policy_of: Callable[[Threshold, Int[np.ndarray, "1 T"]], Policy],
    record: Record,
    say: Say,
) -> None:
    """Scores policies of the study's own at each threshold, as the learned gate's.

    Args:
      policy_of: from the gate's policy and a window to the policy that runs.
    """
    dense = ground.dense[phase]
    record.add(dense, planned=0)
    there = {score.level for score in record.scores}
    for level in ladder(ground.config):
        policy, begun = level.policy_of(LearnedGate()), time.monotonic()
        if level.name in there or not isinstance(policy, Threshold):
            continue
        windows = tuple(_score_each(ground.rows, model, phase, lambda row, policy=policy: policy_of(policy, row)))
        tokens, seconds = ground.rows.windows[:, 1:].size, time.monotonic() - begun
        score = Score(phase, LearnedGate.name, level.name, windows, (), tokens, seconds, policy_to_json(policy))
        record.add(score, planned=0)
        say(score_line(score, dense))


def _score_each(
    rows: EvalRows, model: Transformer, phase: Phase, policy_of: Callable[[np.ndarray], Policy]
) -> Iterator[WindowScore]:
    run = score_prompts if phase is Phase.PREFILL else score_windows
    for row in rows.windows.astype(np.int32):
        scores = jax.device_get(run(model, row[None], policy_of(row[None])))
        yield WindowScore(float(np.asarray(scores.nll, np.float64).mean()), float(scores.kept[0]))


def _fingerprint(gate: Any) -> str:
    """Of a gate's settings and weights."""
    digest = hashlib.sha256(repr(gate.config).encode())
    for leaf in jax.tree.leaves(nnx.state(gate)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

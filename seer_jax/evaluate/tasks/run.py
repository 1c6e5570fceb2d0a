"""Tasks under dense attention and under policies: prompts are continued greedily, and answers are scored."""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.comparison import Measurement, all_methods, check_policy, works
from seer_jax.evaluate.levels import JOIN, LevelPair, Phase, gates_by_phase
from seer_jax.evaluate.tasks.base import PromptEncoder, Sample, Task, TaskPhase
from seer_jax.evaluate.tasks.score import Outcome, TaskScore
from seer_jax.inference.generate import Generated, generate
from seer_jax.inference.prompts import pad_prompts
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.scorers import Scorer

Unit = tuple[str, TaskPhase | None, str | None, str]  # see `TaskScore.unit`


@dataclasses.dataclass(frozen=True)
class TaskPolicy:
    """Under what a task is measured.

    Attributes:
      phase, method, level: as in `TaskScore`.
      prefill, decode: policies that run; the one of a phase that is not measured is dense.
    """

    phase: TaskPhase | None
    method: str | None
    level: str
    prefill: Policy
    decode: Policy

    @property
    def saved(self) -> dict[str, Any]:
        """The policy that may be sparse as JSON, or both by their phases."""
        saved = {"prefill": policy_to_json(self.prefill), "decode": policy_to_json(self.decode)}
        return saved if self.phase is TaskPhase.BOTH else saved[self.phase or TaskPhase.PREFILL]


def task_policies(planned: Sequence[Measurement], pairs: Sequence[TaskPolicy] = ()) -> list[TaskPolicy]:
    """The policies of a comparison (`plan_measurements`): dense attention once, then each of the others in its phase, then those for both
    phases at once (`plan_pairs`)."""
    found = [TaskPolicy(None, None, "dense", Dense(), Dense())]
    for one in planned:
        if one.method is not None:
            by_phase = {phase: one.policy if phase is one.phase else Dense() for phase in Phase}
            phase = TaskPhase(one.phase)
            found.append(TaskPolicy(phase, one.method, one.level, by_phase[Phase.PREFILL], by_phase[Phase.DECODE]))
    return [*found, *pairs]


def plan_pairs(
    model: Transformer, pairs: Sequence[LevelPair], *, methods: Sequence[Scorer] | None = None
) -> list[TaskPolicy]:
    """The policies of levels for both phases at once, checked against the model.

    A half that names its scorer is measured with that, one that names none with each of the methods: with the same one in both halves
    where neither names any. Those that do not work in a half's phase, or whose gate the model lacks, are left out.

    Args:
      model: with weights, or with shapes alone.
      pairs: see `parse_levels`.
      methods: registered scorers; None: `all_methods()`.

    Raises:
      ValueError: no method fits a pair, or a policy does not fit the model.
    """
    found: dict[tuple[str, str], TaskPolicy] = {}
    for pair in pairs:
        before = len(found)
        for method in all_methods() if methods is None else methods:
            scorers = {phase: method if x.methods is None else x.methods[0] for phase, x in pair.levels.items()}
            if all(works(model, scorer, phase) for phase, scorer in scorers.items()):
                policies = [level.policy_of(scorers[phase]) for phase, level in pair.levels.items()]
                name = JOIN.join(dict.fromkeys(scorer.name for scorer in scorers.values()))
                found.setdefault((name, pair.name), TaskPolicy(TaskPhase.BOTH, name, pair.name, *policies))
        if len(found) == before:
            lacking = [phase.value for phase, gate in gates_by_phase(model).items() if gate is None]
            raise ValueError(
                f"{pair.name} must have a scorer for either phase; got none that works"
                + (f", as the model has no {' and no '.join(lacking)} gate" if lacking else "")
                + f". Load the gates (gates=...), or name scorers: {pair.prefill.name}:oracle{JOIN}{pair.decode.name}:oracle."
            )
    for policy in found.values():
        for phase, sparse in ((Phase.PREFILL, policy.prefill), (Phase.DECODE, policy.decode)):
            check_policy(model, phase, sparse)
    return list(found.values())


def run_tasks(
    model: Transformer,
    encoder: PromptEncoder,
    tasks: Sequence[tuple[Task, Sequence[Sample]]],
    policies: Sequence[TaskPolicy],
    *,
    batch_size: int = 8,
    beyond_context: bool = False,
    prefill_chunk: int | None = None,
    done: Collection[Unit] = (),
) -> Iterator[TaskScore]:
    """Scores each task under each policy.

    Args:
      model: with the gates that the policies need.
      encoder: that made the prompts.
      tasks: with their samples.
      policies: see `task_policies`.
      batch_size: prompts at a time; the last batch is filled up, so that all batches share a program.
      beyond_context: allow more tokens than the model's context.
      prefill_chunk: tokens of the prompts that are read at a time, see `Request`.
      done: units of scores that are there already; they are passed over.

    Yields:
      Scores as soon as they are measured, task by task.

    Raises:
      ValueError: a prompt exceeds the model's context, or a policy does not fit the model; see `generate`.
      MemoryError: see `generate`.
    """
    whole_number("batch_size", batch_size)
    settings: dict[str, Any] = dict(beyond_context=beyond_context, prefill_chunk=prefill_chunk)
    for task, samples in tasks:
        for policy in policies:
            if (task.name, policy.phase, policy.method, policy.level) not in done:
                yield _score(model, encoder, task, samples, policy, batch_size, settings)


def end_tokens(model: Transformer, encoder: PromptEncoder) -> tuple[int, ...]:
    """Tokens that end an answer: the model's, and in a chat the end of a turn."""
    return (*model.config.eos_token_ids, *(encoder.tokenizer.end_of_turn() if encoder.is_chat else ()))


def _score(
    model: Transformer,
    encoder: PromptEncoder,
    task: Task,
    samples: Sequence[Sample],
    policy: TaskPolicy,
    batch_size: int,
    request: dict[str, Any],
) -> TaskScore:
    started = time.monotonic()
    settings: dict[str, Any] = dict(
        max_new_tokens=task.new_tokens,
        prefill=policy.prefill,
        decode=policy.decode,
        eos=end_tokens(model, encoder),
        **request,
    )
    outcomes: list[Outcome] = []
    size = min(batch_size, len(samples))
    for first in range(0, len(samples), size):
        batch = samples[first : first + size]
        rows = [sample.tokens for sample in batch]
        tokens, lengths = pad_prompts([*rows, *rows[:1] * (size - len(rows))])
        outcomes += _outcomes(encoder, task, batch, generate(model, tokens, lengths, **settings), policy.phase)
    return TaskScore(
        task=task.name,
        phase=policy.phase,
        method=policy.method,
        level=policy.level,
        outcomes=tuple(outcomes),
        seconds=time.monotonic() - started,
        policy=policy.saved,
    )


def _outcomes(
    encoder: PromptEncoder, task: Task, batch: Sequence[Sample], result: Generated, phase: TaskPhase | None
) -> list[Outcome]:
    prefill, decode = (np.asarray(shares).mean(0) for shares in (result.prefill_kept, result.decode_kept))
    kept, later = decode if phase is TaskPhase.DECODE else prefill, decode if phase is TaskPhase.BOTH else None
    predictions = [encoder.tokenizer.decode_known(row) for row in result.rows()]
    return [
        Outcome(
            task.score(predictions[row], sample),
            float(kept[row]),
            predictions[row],
            sample.answers,
            sample.depth,
            None if later is None else float(later[row]),
        )
        for row, sample in enumerate(batch)
    ]

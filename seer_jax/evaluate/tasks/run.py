"""Tasks under dense attention and under policies: prompts are continued greedily, and answers are scored."""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from seer_jax.checks import whole_number
from seer_jax.evaluate.comparison import Measurement
from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.tasks.base import PromptEncoder, Sample, Task
from seer_jax.evaluate.tasks.score import Outcome, TaskScore
from seer_jax.inference.generate import Generated, generate
from seer_jax.inference.prompts import pad_prompts
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense, Policy

Unit = tuple[str, Phase | None, str | None, str]  # see `TaskScore.unit`


@dataclasses.dataclass(frozen=True)
class TaskPolicy:
    """Under what a task is measured.

    Attributes:
      phase, method, level: as in `TaskScore`.
      prefill, decode: policies that run; one of them is dense.
    """

    phase: Phase | None
    method: str | None
    level: str
    prefill: Policy
    decode: Policy

    @property
    def policy(self) -> Policy:
        """The one that may be sparse."""
        return self.decode if self.phase is Phase.DECODE else self.prefill


def task_policies(planned: Sequence[Measurement]) -> list[TaskPolicy]:
    """The policies of a comparison (`plan_measurements`): dense attention once, then each of the others in its phase."""
    found = [TaskPolicy(None, None, "dense", Dense(), Dense())]
    for one in planned:
        if one.method is not None:
            by_phase = {phase: one.policy if phase is one.phase else Dense() for phase in Phase}
            found.append(TaskPolicy(one.phase, one.method, one.level, by_phase[Phase.PREFILL], by_phase[Phase.DECODE]))
    return found


def run_tasks(
    model: Transformer,
    encoder: PromptEncoder,
    tasks: Sequence[tuple[Task, Sequence[Sample]]],
    policies: Sequence[TaskPolicy],
    *,
    batch_size: int = 8,
    beyond_context: bool = False,
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
      done: units of scores that are there already; they are passed over.

    Yields:
      Scores as soon as they are measured, task by task.

    Raises:
      ValueError: a prompt exceeds the model's context, or a policy does not fit the model; see `generate`.
      MemoryError: see `generate`.
    """
    whole_number("batch_size", batch_size)
    for task, samples in tasks:
        for policy in policies:
            if (task.name, policy.phase, policy.method, policy.level) not in done:
                yield _score(model, encoder, task, samples, policy, batch_size, beyond_context)


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
    beyond_context: bool,
) -> TaskScore:
    started = time.monotonic()
    settings: dict[str, Any] = dict(
        max_new_tokens=task.new_tokens,
        prefill=policy.prefill,
        decode=policy.decode,
        eos=end_tokens(model, encoder),
        beyond_context=beyond_context,
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
        policy=policy_to_json(policy.policy),
    )


def _outcomes(
    encoder: PromptEncoder, task: Task, batch: Sequence[Sample], result: Generated, phase: Phase | None
) -> list[Outcome]:
    shares = result.decode_kept if phase is Phase.DECODE else result.prefill_kept
    kept = np.asarray(shares).mean(0)
    predictions = [encoder.tokenizer.decode_known(row) for row in result.rows()]
    return [
        Outcome(task.score(text, sample), float(share), text, sample.answers, sample.depth)
        for sample, text, share in zip(batch, predictions, kept, strict=False)
    ]

"""Tasks of lm-evaluation-harness under dense attention and under policies, as scores like those of other tasks."""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from seer_jax.evaluate.harness.adapter import harness_class
from seer_jax.evaluate.harness.model import HarnessModel
from seer_jax.evaluate.tasks.base import TaskPhase
from seer_jax.evaluate.tasks.run import TaskPolicy, Unit
from seer_jax.evaluate.tasks.score import Outcome, TaskScore
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer


def run_harness(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    policies: Sequence[TaskPolicy],
    *,
    samples: int,
    length: int,
    batch_size: int = 8,
    seed: int = 0,
    beyond_context: bool = False,
    prefill_chunk: int | None = None,
    done: Collection[Unit] = (),
) -> Iterator[list[TaskScore]]:
    """Scores each task under each policy, as the harness asks and scores it: without chat template, with its number of examples.

    Args:
      model, tokenizer, policies: see `run_tasks`.
      names: of tasks, or of groups of them.
      samples: documents of each task, from its first on.
      length: tokens of a row, at most.
      batch_size: rows at a time.
      seed: of the harness's random choices.
      beyond_context: allow rows of more tokens than the model's context.
      prefill_chunk: tokens of the prompts of continuations that are read at a time, see `Request`.
      done: units of scores that are there already; they are passed over.

    Yields:
      For one name and policy a score for each metric of each task.
    """
    settings: dict[str, Any] = dict(
        batch_size=batch_size, max_length=length, seed=seed, beyond_context=beyond_context, prefill_chunk=prefill_chunk
    )
    for name in names:
        for policy in policies:
            if (name, policy.phase, policy.method, policy.level) not in done:
                wrapped = HarnessModel(model, tokenizer, policy.prefill, policy.decode, **settings)
                yield _scores(wrapped, name, policy, samples)


def _scores(wrapped: HarnessModel, name: str, policy: TaskPolicy, samples: int) -> list[TaskScore]:
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    started = time.monotonic()
    seeds: dict[str, Any] = {f"{kind}_seed": wrapped.seed for kind in ("random", "numpy_random", "fewshot_random")}
    results: Any = simple_evaluate(
        harness_class()(wrapped), tasks=[name], limit=samples, bootstrap_iters=0, log_samples=True, **seeds
    )
    seconds, shares = time.monotonic() - started, {phase: _mean(kept) for phase, kept in wrapped.kept.items()}
    share = shares["decode" if policy.phase is TaskPhase.DECODE else "prefill"]
    later = shares["decode"] if policy.phase is TaskPhase.BOTH else None
    return [
        TaskScore(
            task=f"{task},{metric}",
            phase=policy.phase,
            method=policy.method,
            level=policy.level,
            outcomes=outcomes,
            seconds=seconds,
            policy=policy.saved,
            is_share=all(0 <= outcome.score <= 1 for outcome in outcomes),
            asked=name,
        )
        for task, rows in results["samples"].items()
        for metric, outcomes in outcomes_of(rows, results["results"][task], share, later).items()
    ]


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares) if shares else math.nan


def outcomes_of(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], kept: float, kept_decode: float | None = None
) -> dict[str, tuple[Outcome, ...]]:
    """Outcomes of one task by its metrics: document by document where a metric is a mean over them, otherwise the metric's one value.

    Args:
      rows: the harness's samples: each with `doc_id`, `filter`, names of `metrics` and their values.
      results: the harness's metrics, "NAME,FILTER".
      kept, kept_decode: see `Outcome`.
    """
    found: dict[str, tuple[Outcome, ...]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        for metric in row["metrics"]:
            name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
            if isinstance(row[metric], bool | int | float):
                found[name] = (*found.get(name, ()), Outcome(float(row[metric]), kept, kept_decode=kept_decode))
            elif isinstance(value := results.get(f"{metric},{row['filter']}"), int | float):
                found[name] = (Outcome(float(value), kept, kept_decode=kept_decode),)
    return found

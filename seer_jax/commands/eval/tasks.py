"""`seer-jax eval --tasks`: scores of tasks under dense attention and under policies, shown and kept as they come."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seer_jax.commands import PROGRAM
from seer_jax.commands.arguments import model_of
from seer_jax.commands.stages import Stages
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gates import GATE_PATTERNS
from seer_jax.evaluate.comparison import Measurement, check_context, plan_measurements
from seer_jax.evaluate.levels import SparsityLevel, block_sizes
from seer_jax.evaluate.notes import Row, equal_counts, left_out, recommendations, repeated
from seer_jax.evaluate.record import EXTENDING, describe_file, describe_folder, environment, typed_command
from seer_jax.evaluate.tasks import (
    PromptEncoder,
    Sample,
    Task,
    TaskPolicy,
    TaskRecord,
    TaskScore,
    TaskSettings,
    find_tasks,
    plan_pairs,
    run_tasks,
    task_policies,
)
from seer_jax.evaluate.tasks.run import Unit
from seer_jax.evaluate.tasks.score import figures
from seer_jax.evaluate.tasks.table import Figures, line_of, print_figures, title
from seer_jax.folder_lock import locked
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import resolve, resolve_gates
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import check_output_folder
from seer_jax.text_files import read_text

TASK_SCORES = "tasks.json"
# Settings that change no score of a task: digests stand for some, the others are of perplexity and pass keys.
NOT_IDENTITY = (
    *("output", "force", "model", "gates", "adapter", "text", "dtype", "revision", "cache_dir", "mesh"),
    *("windows", "passkeys", "distractors", "decoded"),
    *EXTENDING,
)


def evaluate_tasks(config: Any, *, console: Console | None = None) -> list[TaskScore]:
    """Prints scores of tasks as they come and a table, keeps them in tasks.json if an output folder is given, and returns them.

    Everything is checked, and every prompt is written, before weights are loaded.

    Args:
      config: an `EvalConfig` with tasks.
      console: to print on.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: model, gates, text or files of tasks are not there.
      ImportError: a task is one of lm-evaluation-harness, which is not installed.
      BlockingIOError: another run is using the output.
      OSError: the output can't be written.
      ValueError: settings, tasks, model and gates do not fit each other, or the output holds scores of another evaluation.
      MemoryError: the device has no room for a generation.
    """
    if config.output is not None:
        check_output_folder(config.output)
    stages = Stages(console or Console())
    job = TaskJob.of(config)
    for note in job.notes():
        stages.say(note)
    with locked(config.output):
        record = None if config.output is None else job.record(config.output / TASK_SCORES)
        done = 0 if record is None else len(record.scores)
        scores = _measure(job, stages, record)
    if scores:
        print_figures(stages.console, figures(scores))
    if record is not None and len(record.scores) > done:
        stages.say(f"Written: {record.path}")
    return scores


@dataclasses.dataclass(frozen=True)
class TaskJob:
    """What is measured, checked before weights are loaded.

    Attributes:
      config: as the user wrote it.
      name: of the base model.
      dtype: of its weights.
      shapes: the model without weights.
      encoder: of the prompts.
      settings: of the samples.
      tasks: with their samples.
      harness: names of tasks of lm-evaluation-harness.
      levels, planned: see `plan_measurements`.
      pairs: policies for both phases at once, see `plan_pairs`.
    """

    config: Any
    name: str
    dtype: DType
    shapes: Transformer
    encoder: PromptEncoder
    settings: TaskSettings
    tasks: Sequence[tuple[Task, Sequence[Sample]]]
    harness: Sequence[str]
    levels: Sequence[SparsityLevel]
    planned: Sequence[Measurement]
    pairs: Sequence[TaskPolicy]

    @classmethod
    def of(cls, config: Any) -> "TaskJob":
        """The job of an `EvalConfig`."""
        named = find_tasks(config.tasks)
        dtype, name = config.dtype or DType.default(), model_of(config.model, config.gates, config.hub, config.adapter)
        shapes = from_pretrained(name, config.gates, dtype=dtype, abstract=True, **config.loading)
        check_context(shapes, config.length, beyond_context=config.beyond_context)
        levels = config.levels(shapes)
        planned = plan_measurements(shapes, levels, methods=config.methods, phases=config.phases)
        pairs = plan_pairs(shapes, config.pairs(shapes), methods=config.methods)
        if config.prefill_chunk:
            for policy in task_policies(planned, pairs):
                shapes.check_chunk(config.prefill_chunk, policy.prefill, keeps_decode_keys=policy.decode.needs_gate)
        encoder = PromptEncoder(load_tokenizer(name, **config.hub), config.chat)
        essay = None if config.text is None else read_text(config.text)
        settings = TaskSettings(config.length, config.samples, config.seed, essay)
        tasks = [(task, _samples(task, encoder, settings)) for task in named.tasks]
        return cls(config, name, dtype, shapes, encoder, settings, tasks, named.harness, levels, planned, pairs)

    @property
    def policies(self) -> Sequence[TaskPolicy]:
        """The policies under which the tasks are measured."""
        return task_policies(self.planned, self.pairs)

    def load(self) -> Transformer:
        """The model with its weights."""
        return from_pretrained(self.name, self.config.gates, dtype=self.dtype, **self.config.loading)

    def notes(self) -> list[str]:
        """What a reader of the table should know before it comes."""
        notes = recommendations(self.shapes)
        notes += left_out(self.planned, self.levels, self.config.methods, self.config.phases) + repeated(self.levels)
        rows = {Row(len(x.tokens) + task.new_tokens, len(x.tokens)) for task, samples in self.tasks for x in samples}
        notes += equal_counts(self.shapes, self.levels, self.config.phases, rows=rows) if rows else []
        for task, samples in self.tasks:
            if len(samples) < self.settings.count:
                notes.append(f"{task.name} has {len(samples)} samples; {self.settings.count} were asked for.")
        return notes

    @property
    def titles(self) -> list[str]:
        """Names of all tasks."""
        return [*(task.name for task, _ in self.tasks), *self.harness]

    def record(self, path: Path) -> TaskRecord:
        """The record in a file, new or to go on from, with all that is needed to repeat the evaluation."""
        config, patterns = self.config, (*BASE_PATTERNS, *TOKENIZER_PATTERNS)
        model = describe_folder(self.name, resolve(self.name, patterns, **config.hub), patterns)
        folders = resolve_gates(config.gates, GATE_PATTERNS, cache_dir=config.cache_dir)
        adapter = config.describe_adapter()
        gates = [describe_folder(str(folder), folder, GATE_PATTERNS) for folder in folders]
        sources: list[Any] = [*(getattr(task, "source", None) for task, _ in self.tasks), config.text]
        files = [describe_file(source) for source in dict.fromkeys(sources) if source is not None]
        here, settings = environment(), config.to_json()
        facts = {
            "command": typed_command(PROGRAM),
            **here,
            "config": settings,
            "dtype": self.dtype.value,
            "model": model,
            "gates": gates,
            **adapter,
            "files": files,
            "tasks": self.titles,
            "block_sizes": {phase.value: size for phase, size in block_sizes(self.shapes).items()},
        }
        identity = {
            "settings": {name: value for name, value in settings.items() if name not in NOT_IDENTITY},
            "dtype": self.dtype.value,
            "model": model["fingerprint"],
            "gates": sorted(gate["fingerprint"] for gate in gates),
            **{name: one["fingerprint"] for name, one in adapter.items()},
            "files": sorted(file["sha256"] for file in files),
            "device": here["device"],
            "versions": {name: version for name, version in here["versions"].items() if name != "python"},
        }
        return TaskRecord(path, facts, identity, force=config.force)


def _samples(task: Task, encoder: PromptEncoder, settings: TaskSettings) -> list[Sample]:
    try:
        return task.samples(encoder, settings)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from error


def _measure(job: TaskJob, stages: Stages, record: TaskRecord | None) -> list[TaskScore]:
    """The scores that are there, those of other policies too, and those that are measured, each shown and kept as it comes."""
    scores: list[TaskScore] = [] if record is None else list(record.scores)
    planned = {(name, one.phase, one.method, one.level) for name in job.titles for one in job.policies}
    there = {score.unit for score in scores}
    if record is not None and scores:
        record.check_policies(job.policies)
        stages.say(f"{len(planned & there)} of {len(planned)} scores are in {record.path}; --force measures them anew.")
    if planned <= there:
        return scores
    with stages.stage("Loading the model"):
        model = job.load()
    try:
        with stages.stage("Measuring", len(planned - there), every_step=True) as advance:
            for new in _new_scores(job, model, there):
                scores += new
                last = planned <= {score.unit for score in scores}
                for number, score in enumerate(new, start=1):
                    if record is not None:
                        record.add(score, planned=len(scores) if last and number == len(new) else len(scores) + 1)
                advance("; ".join(line_of(line) for line in figures(scores) if _is_of(line, new)))
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"{len(planned & {score.unit for score in scores})} of {len(planned)} scores are kept in {record.path}; the same command goes on from there."
            if record is not None and scores
            else "No score is kept; with --output FOLDER each is, and the same command goes on."
        )
        raise
    return scores


def _new_scores(job: TaskJob, model: Transformer, there: Collection[Unit]) -> Iterator[Sequence[TaskScore]]:
    """Scores that are not there yet, those of one task under one policy at a time."""
    settings: dict[str, Any] = {
        name: getattr(job.config, name) for name in ("batch_size", "beyond_context", "prefill_chunk")
    }
    for score in run_tasks(model, job.encoder, job.tasks, job.policies, done=there, **settings):
        yield [score]
    if job.harness:
        from seer_jax.evaluate.harness.tasks import run_harness

        settings |= dict(samples=job.settings.count, length=job.settings.length, seed=job.settings.seed, done=there)
        yield from run_harness(model, job.encoder.tokenizer, job.harness, job.policies, **settings)


def _is_of(line: Figures, scores: Sequence[TaskScore]) -> bool:
    """Whether a line of the table is about one of the scores."""
    return any(
        (line.task, line.phase, line.level) == (s.task, s.phase, s.level) and line.title == title(s.method)
        for s in scores
    )

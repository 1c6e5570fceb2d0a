"""Distil gates for the bundled model, calibrate them, and compare them with other ways to choose blocks."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least, check_seed, listed
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import MeshOptions, parse
from seer_jax.commands.demo.levels import (
    CALIBRATED,
    at_equal_shares,
    calibrated_levels,
    gains,
    least_share,
    level_at,
    num_calibration_steps,
)
from seer_jax.commands.stages import Stages
from seer_jax.convert import save_gates
from seer_jax.evaluate.comparison import compare, plan_measurements
from seer_jax.evaluate.levels import Phase, SparsityLevel, gates_by_phase
from seer_jax.evaluate.passkey import PassKeyPrompt
from seer_jax.evaluate.record import environment, typed_command, write_scores
from seer_jax.evaluate.rows import EvalRows, make_rows, text_windows
from seer_jax.evaluate.score import Score, dense_of
from seer_jax.evaluate.table import losses, narrow_leads, print_scores, score_line
from seer_jax.folder_lock import LOCK, locked
from seer_jax.gates.configs import TrainedGates
from seer_jax.gates.kinds import GateKind, gates_of_kind
from seer_jax.inference.generate import generate
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import read_config
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.outputs import check_matplotlib, check_output_folder
from seer_jax.plots import block_maps, far_sighted_heads, plot_block_maps
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.scorers import LearnedGate
from seer_jax.settings import check_types
from seer_jax.sharding.layout import Layout
from seer_jax.tiny_lm.corpus import held_out_text, training_rows
from seer_jax.train import DistillConfig, OptimizerConfig, TargetStatistic, distill

PLOTTED_HEADS = 4
BLOCK_SIZE, BUNDLED_BLOCK_SIZE = 32, 64
# Few keys with many questions: the gates are trained on many questions whose answer is in a single block.
KEYS_PER_ROW, QUESTIONS_PER_KEY = 2, 6
DENSE_LAST_ROWS = 2  # of the saved policy: block rows at a prompt's end, which hold its question


@dataclasses.dataclass(frozen=True)
class DemoConfig(MeshOptions):
    """Distils gates for the bundled model, calibrates them, compares them with other ways to choose blocks, and generates text.

    Attributes:
      output: folder for scores.json, block_maps.png and the gates.
      densities: shares of the blocks to keep, in (0, 1]; the gates are calibrated for each, and recommend what was chosen for the largest.
      bundled_gates: use the gates that come with the model, for blocks of 64 tokens, instead of distilling new ones.
      kind: which gates are distilled: those of the release, or fine ones, which look inside blocks.
      block_size: tokens per block; None: 32, or the block size of the bundled gates. Short texts need small blocks: 64, the usual size,
        leaves three to choose at 10%.
      length: tokens of each text, in training and evaluation.
      steps: training steps of one row of text each.
      learning_rate: peak learning rate.
      windows: windows of held-out text for the perplexity.
      calibration_windows: windows that thresholds are calibrated on, of held-out files that are not scored.
      passkeys: number of pass-key prompts; a multiple of 9 covers all depths equally.
      decoded: tokens at the end of each pass-key prompt that decoding appends, after dense attention over the others; windows are decoded
        whole.
      new_tokens: number of generated tokens.
      seed: seed of all random choices.
    """

    output: Path = Path("seer_demo")
    densities: tuple[float, ...] = (0.2,)
    bundled_gates: bool = False
    kind: GateKind = GateKind.RELEASE
    block_size: int | None = None
    length: int = 2048
    steps: int = 80
    learning_rate: float = 3e-3
    windows: int = 4
    calibration_windows: int = 3
    passkeys: int = 9
    decoded: int = 64
    new_tokens: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        if not self.densities or not all(0 < density <= 1 for density in self.densities):
            raise ValueError(
                f"densities must be at least one share of the blocks in (0, 1]; got {listed(self.densities)}."
            )
        if self.bundled_gates and self.tokens_per_block != BUNDLED_BLOCK_SIZE:
            raise ValueError(
                f"block_size must be {BUNDLED_BLOCK_SIZE} with the bundled gates; got {self.block_size}. Leave it out."
            )
        if self.length < 4 * self.tokens_per_block or self.length % self.tokens_per_block:
            raise ValueError(
                f"length must be a multiple of block_size = {self.tokens_per_block}, at least four blocks; got {self.length}."
            )
        if min(self.densities) < (least := least_share(self.length // self.tokens_per_block)):
            raise ValueError(
                f"densities must be at least {math.ceil(1000 * least) / 1000} at {self.length} tokens, as decoding always reads the first "
                f"block and the token's own; got {min(self.densities)}. Raise it, or use longer texts."
            )
        check_at_least(1, self, "windows", "calibration_windows", "passkeys", "new_tokens")
        check_at_least(2, self, "steps")
        check_seed("seed", self.seed)

    @property
    def largest_share(self) -> str:
        """The largest of the densities, as it is shown."""
        return f"{100 * max(self.densities):g}% of the blocks"

    @property
    def tokens_per_block(self) -> int:
        """b."""
        if self.block_size is not None:
            return self.block_size
        return BUNDLED_BLOCK_SIZE if self.bundled_gates else BLOCK_SIZE


def run(words: list[str]) -> int:
    demo(parse(DemoConfig, "demo", words))
    return ExitCode.OK


def demo(config: DemoConfig, *, console: Console | None = None) -> list[Score]:
    """Runs the demonstration, prints it, writes its files, and returns the scores.

    Gates are saved when they are distilled and scores as they come. Without matplotlib the plot is left out.

    Raises:
      BlockingIOError: another run is using the output.
      OSError: the output can't be written; nothing is done then.
    """
    check_output_folder(config.output)
    stages = Stages(console or Console())
    try:
        with locked(config.output):
            return _demo(config, stages)
    except KeyboardInterrupt as stop:
        files = [str(path) for path in sorted(config.output.glob("[!.]*")) if path.name != LOCK]
        stop.add_note(f"Kept so far: {', '.join(files) or 'nothing'}.")
        raise


def _demo(config: DemoConfig, stages: Stages) -> list[Score]:
    plots, devices = _can_plot(stages), config.devices
    with stages.stage("Loading the bundled model"):
        gates = tiny_lm.NAME if config.bundled_gates else None
        base, tokenizer = from_pretrained(tiny_lm.NAME, gates, dtype="float32"), load_tokenizer(tiny_lm.NAME)
        layout = None if devices is None else Layout.of(devices, base.config)
        rows = make_rows(
            tokenizer,
            tiny_lm.eval_text(),
            vocab_size=base.config.vocab_size,
            length=config.length,
            windows=config.windows,
            passkeys=config.passkeys,
            decoded=config.decoded,
            seed=config.seed,
        )
    model = base if config.bundled_gates else _distil(config, stages, base, tokenizer)
    model = model if layout is None else layout.spread(model)
    levels = _calibrate(config, stages, model, tokenizer)
    scores = _compare(config, stages, model, rows, levels)
    plot = None
    if plots:
        with stages.stage("Drawing block maps"):
            plot = _draw(config, model, rows, levels)
    with stages.stage("Generating, dense and sparse", 2) as advance:
        texts = {}
        for name, policy in (("dense", Dense()), (config.largest_share, None)):
            texts[name] = _continue(config, model, tokenizer, rows.prompts[0], policy)
            advance(name)
    _report(config, stages, scores, texts, rows.prompts[0], plot)
    return scores


def _can_plot(stages: Stages) -> bool:
    try:
        check_matplotlib()
    except ImportError as error:
        stages.say(f"{error} block_maps.png is left out.")
        return False
    return True


def _distil(config: DemoConfig, stages: Stages, base: Transformer, tokenizer: Tokenizer) -> Transformer:
    """Both gates from the same dense passes over text that the evaluation does not use."""
    with stages.stage("Preparing training text"):
        data = training_rows(
            tokenizer,
            base.config.vocab_size,
            length=config.length,
            count=config.steps,
            keys=KEYS_PER_ROW,
            questions=QUESTIONS_PER_KEY,
            seed=config.seed,
        )
    gates = gates_of_kind(config.kind, block_size=config.tokens_per_block, gate_dim=base.config.head_dim)
    settings = DistillConfig(
        kind=TrainedGates.BOTH,
        prefill=gates.prefill,
        decode=gates.decode,
        target=TargetStatistic(gates.target),
        decode_stride=gates.decode_stride,
        sequence_length=config.length,
        batch_size=1,
        steps=config.steps,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=config.steps // 20),
        dtype=DType.FLOAT32,
        seed=config.seed,
    )
    with stages.stage("Distilling the gates", config.steps) as advance:
        model = distill(settings, model=base, dataset=data, progress=lambda report: advance(report.summary)).model
    _save(config, model)
    return model


def _save(config: DemoConfig, model: Transformer) -> None:
    for phase, gate in gates_by_phase(model).items():
        folder = config.output / f"{phase}_gate"
        save_gates(gate, folder, base_model=tiny_lm.NAME, hf_config=read_config(tiny_lm.path()))


def _calibrate(config: DemoConfig, stages: Stages, model: Transformer, tokenizer: Tokenizer) -> list[SparsityLevel]:
    """Levels with thresholds for each share of the blocks; the gates recommend those of the largest from then on."""
    with stages.stage("Preparing calibration text"):
        text = np.array(tokenizer.encode(held_out_text(), special_tokens=False), np.int32)
        windows = text_windows(text, config.length, config.calibration_windows)
    steps = num_calibration_steps(len(windows), config.densities)
    with stages.stage("Calibrating gates and oracle", steps) as advance:
        levels = calibrated_levels(model, windows, config.densities, advance)
    for phase, gate in gates_by_phase(model).items():
        rows = {"dense_last_rows": DENSE_LAST_ROWS}
        gate.recommended = dataclasses.replace(_gate_policy(levels, phase, max(config.densities)), **rows)
    if not config.bundled_gates:
        _save(config, model)
    return levels


def _gate_policy(levels: Sequence[SparsityLevel], phase: Phase, density: float) -> Any:
    """The calibrated policy of the learned gate."""
    own = (phase,), (LearnedGate(),), level_at(density, CALIBRATED)
    return next(x.policy for x in levels if (x.phases, x.methods, x.name) == own)


def _compare(
    config: DemoConfig, stages: Stages, model: Transformer, rows: EvalRows, levels: Sequence[SparsityLevel]
) -> list[Score]:
    measurements = len(plan_measurements(model, levels))
    workers = 2 if jax.default_backend() == "cpu" and model.layout is None else 1
    scores = []
    with stages.stage("Comparing ways to choose blocks", measurements) as advance:
        for score in compare(model, rows, levels, batch_size=len(rows.prompts), workers=workers):
            scores.append(score)
            _write(config, stages, scores)
            advance(score_line(score, dense_of(score, scores)))
    return scores


def _write(config: DemoConfig, stages: Stages, scores: list[Score], **facts: Any) -> Path:
    """Writes scores.json: after each score, and at the end with what else there is to tell."""
    path = config.output / "scores.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    seconds = {title: round(seconds, 1) for title, seconds in stages.seconds.items()}
    facts = {"command": typed_command(PROGRAM), **environment(), "config": settings, "stage_seconds": seconds, **facts}
    write_scores(path, scores, **facts)
    return path


def _draw(config: DemoConfig, model: Transformer, rows: EvalRows, levels: Sequence[SparsityLevel]) -> Path:
    density = min(config.densities)
    maps = block_maps(model, rows.prompts[0].tokens, _gate_policy(levels, Phase.PREFILL, density))
    title = f"A pass-key prompt of {rows.length} tokens, blocks of {config.tokens_per_block}; the gate keeps {density:.0%} of the blocks"
    heads = far_sighted_heads(maps, PLOTTED_HEADS)
    return plot_block_maps(config.output / "block_maps.png", maps, heads, title=title)


def _continue(
    config: DemoConfig, model: Transformer, tokenizer: Tokenizer, prompt: PassKeyPrompt, policy: Policy | None
) -> str:
    """A pass-key prompt without its answer, continued greedily; by what the gates recommend where no policy is given."""
    question: Int[np.ndarray, "T"] = prompt.tokens[: -prompt.answer_length]
    result = generate(model, question[None], max_new_tokens=config.new_tokens, prefill=policy, decode=policy)
    return tokenizer.decode_known(result.rows()[0])


def _report(
    config: DemoConfig,
    stages: Stages,
    scores: list[Score],
    texts: dict[str, str],
    prompt: PassKeyPrompt,
    plot: Path | None,
) -> None:
    """Prints table, text and paths, and writes scores.json."""
    stages.say("")
    print_scores(stages.console, scores)
    alike = at_equal_shares(scores)
    not_beaten, narrow, gained = losses(alike), narrow_leads(alike), gains(scores)
    verdict = "The calibrated gate beats sink+window and random blocks in perplexity and in pass keys."
    stages.say(
        "\n" + "\n".join(["The calibrated gate does not win everywhere:", *not_beaten] if not_beaten else [verdict])
    )
    stages.say("\n".join(["What thresholds per layer and head gain:", *gained]))
    if narrow:
        stages.say(
            "\n".join(["It leads by less than the 95% interval of the difference, which may be chance, in", *narrow])
        )
    stages.say(f"\nThe end of a prompt whose pass key of {prompt.name} is {prompt.answer}, continued greedily:")
    for name, text in texts.items():
        stages.say(f"[{name}]{text}")
    path = _write(config, stages, scores, not_beaten=not_beaten, narrow_leads=narrow, gains=gained, texts=texts)
    stages.say(f"\nTook {sum(stages.seconds.values()):.0f} s in all. Written:")
    stages.say(f"  {path}  all scores")
    if plot is not None:
        stages.say(f"  {plot}  true block map, gate's map and kept blocks")
    gates = [tiny_lm.NAME]
    if not config.bundled_gates:
        gates = [str(config.output / f"{kind}_gate") for kind in ("prefill", "decode")]
        stages.say(f"  {'  '.join(gates)}  the gates, which recommend the thresholds for {config.largest_share}")
    stages.say(f"Try the gates:\n  {PROGRAM} generate --gates {shlex.join(gates)} --prompt 'def main('")

"""`seer-jax demo`: distils gates for the bundled model and compares them with other ways to choose blocks, in minutes on a CPU."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least
from seer_jax.commands.eval import EvalConfig, make_rows, score_line
from seer_jax.commands.stages import Stages
from seer_jax.evaluate import Method, PassKeyPrompt, Phase, Rows, Score, Setting, block_maps, compare
from seer_jax.evaluate.plots import far_sighted_heads, plot_block_maps
from seer_jax.evaluate.table import beaten, print_scores, write_scores
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference.generate import generate
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TopK
from seer_jax.tiny_lm.corpus import training_rows

PLOTTED_HEADS = 4
BLOCK_SIZE, BUNDLED_BLOCK_SIZE = 32, 64
# Few keys, asked for often: the gates then see many questions whose answer lies in one block alone.
KEYS_PER_ROW, QUESTIONS_PER_KEY = 2, 6


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The whole loop on the bundled model: distil its gates, then measure, draw and generate with fewer blocks.

    Attributes:
      output: folder for scores.json, block_maps.png and the gates.
      densities: shares of the blocks to keep, in (0, 1].
      bundled_gates: take the gates that come with the model, for blocks of 64 tokens, instead of distilling new ones.
      block_size: tokens per block; None: 32, or that of the bundled gates. Short texts want small blocks: 64, the usual size, leaves
        three to choose at 10%.
      length: tokens of each text, in training and evaluation.
      steps: of training, one row of text each.
      learning_rate: at its peak.
      windows: windows of held-out text for the perplexity.
      passkeys: pass-key prompts; a multiple of 9 has all depths alike.
      decoded: tokens at the end of each row that decoding appends.
      new_tokens: tokens of the generated text.
      seed: of everything drawn at random.
    """

    output: Path = Path("seer_demo")
    densities: tuple[float, ...] = (0.1, 0.2, 0.4)
    bundled_gates: bool = False
    block_size: int | None = None
    length: int = 2048
    steps: int = 80
    learning_rate: float = 3e-3
    windows: int = 4
    passkeys: int = 9
    decoded: int = 64
    new_tokens: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.densities or not all(0 < density <= 1 for density in self.densities):
            raise ValueError(f"densities are shares of the blocks, in (0, 1], at least one; got {self.densities}.")
        if self.bundled_gates and self.tokens_per_block != BUNDLED_BLOCK_SIZE:
            raise ValueError(
                f"The bundled gates are for blocks of {BUNDLED_BLOCK_SIZE} tokens; got block_size={self.block_size}. Leave it out."
            )
        if self.length < 4 * self.tokens_per_block or self.length % self.tokens_per_block:
            raise ValueError(
                f"length is a multiple of block_size = {self.tokens_per_block}, four or more; got {self.length}."
            )
        check_at_least(1, self, "windows", "passkeys", "new_tokens")
        if self.steps < 2:
            raise ValueError(f"Training takes at least 2 steps; got {self.steps}.")

    @property
    def tokens_per_block(self) -> int:
        """b."""
        if self.block_size is not None:
            return self.block_size
        return BUNDLED_BLOCK_SIZE if self.bundled_gates else BLOCK_SIZE

    @property
    def evaluation(self) -> EvalConfig:
        """Which rows are measured."""
        return EvalConfig(
            length=self.length,
            windows=self.windows,
            passkeys=self.passkeys,
            decoded=self.decoded,
            seed=self.seed,
        )


def demo(config: DemoConfig, *, console: Console | None = None) -> list[Score]:
    """Runs the demonstration, prints it, writes its files, and returns the scores."""
    from seer_jax.models.pretrained import from_pretrained

    stages = Stages(console or Console())
    with stages.stage("Loading the bundled model"):
        folder = tiny_lm.path()
        gates = tuple(tiny_lm.gates().values()) if config.bundled_gates else ()
        base = from_pretrained(folder, gates, dtype="float32")
        tokenizer = Tokenizer.load(folder)
        text = (folder / "eval_text.txt").read_text(encoding="utf-8")
        rows = make_rows(config.evaluation, tokenizer, text, base.config.vocab_size)
    model = base if config.bundled_gates else _distil(config, stages, base, tokenizer)
    scores = _compare(config, stages, model, rows)
    with stages.stage("Drawing block maps"):
        picture = _draw(config, model, rows)
    with stages.stage("Generating, dense and sparse", 2) as advance:
        density = sorted(config.densities)[len(config.densities) // 2]
        texts = {}
        for name, policy in (("dense", Dense()), (f"{density:.0%} of the blocks", TopK(density))):
            texts[name] = _continue(config, model, tokenizer, rows.prompts[0], policy)
            advance(name)
    _tell(config, stages, scores, texts, rows.prompts[0], picture)
    return scores


def _distil(config: DemoConfig, stages: Stages, base: Transformer, tokenizer: Tokenizer) -> Transformer:
    """Both gates from the same dense passes over text that the evaluation does not use."""
    from seer_jax.convert import save_gates
    from seer_jax.models.hub import read_config
    from seer_jax.train import DistillConfig, Gates, OptimizerConfig, distill

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
    settings = DistillConfig(
        gates=Gates.BOTH,
        prefill=PrefillGateConfig(block_size=config.tokens_per_block, gate_dim=base.config.head_dim),
        decode=DecodeGateConfig(block_size=config.tokens_per_block, gate_dim=base.config.head_dim),
        sequence_length=config.length,
        batch_size=1,
        steps=config.steps,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=config.steps // 20),
        precision=DType.FLOAT32,
        seed=config.seed,
    )
    with stages.stage("Distilling the gates", config.steps) as advance:
        model = distill(settings, model=base, dataset=data, progress=lambda report: advance(report.summary)).model
    for kind, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate)):
        assert gate is not None
        save_gates(gate, config.output / f"{kind}_gate", base_model=tiny_lm.NAME, hf_config=read_config(tiny_lm.path()))
    return model


def _compare(config: DemoConfig, stages: Stages, model: Transformer, rows: Rows) -> list[Score]:
    settings = [Setting(f"{density:.0%}", TopK(density)) for density in config.densities]
    measurements = len(Phase) * (1 + len(settings) * len(Method))
    workers = 2 if jax.default_backend() == "cpu" else 1
    scores = []
    with stages.stage("Comparing ways to choose blocks", measurements) as advance:
        for score in compare(model, rows, settings, batch_size=len(rows.tokens), workers=workers):
            scores.append(score)
            advance(score_line(score))
    return scores


def _draw(config: DemoConfig, model: Transformer, rows: Rows) -> Path:
    density = min(config.densities)
    maps = block_maps(model, rows.prompts[0].tokens, density=density)
    title = f"A pass-key prompt of {rows.length} tokens, blocks of {config.tokens_per_block}; the gate keeps {density:.0%} of the blocks"
    heads = far_sighted_heads(maps, PLOTTED_HEADS)
    return plot_block_maps(config.output / "block_maps.png", maps, heads, title=title)


def _continue(
    config: DemoConfig, model: Transformer, tokenizer: Tokenizer, prompt: PassKeyPrompt, policy: Policy
) -> str:
    """What greedy decoding makes of a pass-key prompt without its answer."""
    question: Int[np.ndarray, "T"] = prompt.tokens[: -prompt.answer_length]
    result = generate(model, question[None], max_new_tokens=config.new_tokens, prefill=policy, decode=policy)
    return tokenizer.decode(result.rows()[0])


def _tell(
    config: DemoConfig,
    stages: Stages,
    scores: list[Score],
    texts: dict[str, str],
    prompt: PassKeyPrompt,
    picture: Path,
) -> None:
    """Prints table, text and places, and writes scores.json."""
    stages.say("")
    print_scores(stages.console, scores)
    exceptions = beaten(scores)
    verdict = "The learned gate beats sink+window and random blocks at every density, in perplexity and in pass keys."
    stages.say(
        "\n" + "\n".join(["The learned gate does not win everywhere:", *exceptions] if exceptions else [verdict])
    )
    stages.say(f"\nThe end of a prompt whose pass key of {prompt.name} is {prompt.answer}, continued greedily:")
    for name, text in texts.items():
        stages.say(f"[{name}]{text}")
    facts = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "stage_seconds": {title: round(seconds, 1) for title, seconds in stages.seconds.items()},
        "not_beaten": exceptions,
        "texts": texts,
    }
    path = config.output / "scores.json"
    write_scores(path, scores, **facts)
    stages.say(f"\nTook {sum(stages.seconds.values()):.0f} s in all. Written:")
    stages.say(
        f"  {path}  every number above, and more of them\n  {picture}  true block map, gate's map and kept blocks"
    )
    gates = [tiny_lm.NAME]
    if not config.bundled_gates:
        gates = [str(config.output / f"{kind}_gate") for kind in ("prefill", "decode")]
        stages.say(f"  {'  '.join(gates)}  the gates")
    stages.say(
        "Try the gates:\n"
        f"  seer-jax generate --gates {' '.join(gates)} --prefill topk:0.5 --decode topk:0.5 --prompt 'def main('"
    )

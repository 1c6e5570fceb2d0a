"""Measure a model's quality with fewer blocks, by perplexity and pass keys."""

import dataclasses
from pathlib import Path

from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least
from seer_jax.commands.arguments import ExitCode, HubOptions, model_of, parse, policy_help
from seer_jax.evaluate.comparison import (
    Phase,
    Score,
    SparsityLevel,
    all_methods,
    compare,
    level_name,
    recommended_levels,
)
from seer_jax.evaluate.rows import make_rows
from seer_jax.evaluate.table import print_scores, score_line, write_scores
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy, TopK
from seer_jax.selection.scorers import Scorer
from seer_jax.text_files import read_text

DENSITIES = (0.1, 0.2, 0.4)

DESCRIPTION = """Measures perplexity on a text and the share of pass keys that are found, with dense attention and with each method
of choosing blocks.

{policies}

The methods take the place of a policy's scorer, and dense_last_rows is 0: the last rows of a prompt, which hold the question, are as sparse
as the others."""


@dataclasses.dataclass(frozen=True)
class EvalConfig(HubOptions):
    """Measures perplexity on a text and the share of pass keys that are found.

    Attributes:
      model: folder or hub id of the base model; tiny-lm is the bundled one. None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm stands for both gates of the
        bundled model. A phase without a gate has no learned method.
      text: UTF-8 file to measure on; None: Python source code that the bundled model was not trained on.
      policies: how many blocks are kept; none: 10%, 20% and 40% of them, and what the gates recommend.
      methods: what ranks the blocks.
      phases: what is sparse: prompts, appended tokens, or both.
      length: tokens of each window and prompt.
      windows: number of windows for the perplexity, spread over the text.
      passkeys: number of pass-key prompts; a multiple of 9 covers all depths equally.
      distractors: number of pass keys of other names in each prompt.
      decoded: tokens at the end of each row that decoding appends.
      batch_size: rows decoded at a time.
      seed: seed of the pass keys.
      dtype: dtype of the base model's weights and arithmetic; None: bfloat16, or float32 on a CPU.
      output: folder for scores.json; None: none is written.
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
    text: Path | None = None
    policies: tuple[Policy, ...] = ()
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
    output: Path | None = None

    def __post_init__(self) -> None:
        check_at_least(1, self, "length", "windows", "decoded", "batch_size")
        check_at_least(0, self, "passkeys", "distractors", "seed")
        for policy in self.policies:
            if not isinstance(policy, RankingPolicy):
                raise ValueError(
                    f"policies must rank blocks (topk, budget, threshold or mass); got {policy}. Dense attention is measured anyway."
                )

    def levels(self, model: Transformer) -> list[SparsityLevel]:
        """How many blocks are kept with this model."""
        if self.policies:
            return [SparsityLevel(level_name(p), p) for p in self.policies if isinstance(p, RankingPolicy)]
        levels = [SparsityLevel(level_name(policy), policy) for policy in map(TopK, DENSITIES)]
        names = {level.name for level in levels}
        return levels + [level for level in recommended_levels(model) if level_name(level.policy) not in names]


def run(words: list[str]) -> int:
    description = DESCRIPTION.format(policies=policy_help())
    evaluate(parse(EvalConfig, "eval", words, description=description))
    return ExitCode.OK


def evaluate(config: EvalConfig) -> list[Score]:
    """Prints the table, writes scores.json if an output folder is given, and returns the scores.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
      ValueError: settings, model, gates and text do not fit each other.
    """
    text = tiny_lm.eval_text() if config.text is None else read_text(config.text)
    name = model_of(config.model, config.gates, config.hub)
    model = from_pretrained(name, config.gates, dtype=config.dtype or DType.default(), **config.hub)
    rows = make_rows(
        load_tokenizer(name, **config.hub),
        text,
        vocab_size=model.config.vocab_size,
        length=config.length,
        windows=config.windows,
        passkeys=config.passkeys,
        distractors=config.distractors,
        decoded=config.decoded,
        seed=config.seed,
    )
    console, scores = Console(), []
    levels = config.levels(model)
    for level in recommended_levels(model):
        console.print(f"The {level.phases[0]} gate recommends {level.name}.", highlight=False, soft_wrap=True)
    for score in compare(
        model, rows, levels, methods=config.methods, phases=config.phases, batch_size=config.batch_size
    ):
        scores.append(score)
        console.print(score_line(score), highlight=False, soft_wrap=True)
    print_scores(console, scores)
    if config.output is not None:
        path = config.output / "scores.json"
        write_scores(path, scores, model=name, gates=config.gates, length=config.length, seed=config.seed)
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    return scores

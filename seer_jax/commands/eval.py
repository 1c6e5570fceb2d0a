"""`seer-jax eval`: quality of a model at given densities, by perplexity and pass keys."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from seer_jax import tiny_lm
from seer_jax.checks import check_at_least
from seer_jax.commands.arguments import PolicyArgument
from seer_jax.evaluate.comparison import Method, Phase, Rows, Score, Setting, compare
from seer_jax.evaluate.passkey import passkey_prompts
from seer_jax.evaluate.scoring import text_windows
from seer_jax.evaluate.table import print_scores, write_scores
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.selection.notation import write_policy
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy, TopK


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Measures perplexity on a text and how often pass keys are found, with dense attention and with each way to choose blocks.

    How many blocks are kept is written topk:DENSITY, budget:TOKENS, threshold:P or mass:P. The last rows of a prompt, which hold the
    question, are as sparse as the others here.

    Attributes:
      model: folder or hub id of the base model; tiny-lm is the bundled one.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm stands for both of the
        bundled model. Without one, that phase has no learned gate.
      text: UTF-8 file to measure on; None: Python source that the bundled model has not seen.
      policies: how many blocks are kept (policies; what they rank by is left to the methods).
      methods: what ranks the blocks.
      phases: where: on prompts, on appended tokens, or both.
      length: tokens of each window and prompt.
      windows: windows for the perplexity, spread over the text.
      passkeys: pass-key prompts; a multiple of 9 has all depths alike.
      distractors: pass keys of other names in each prompt.
      decoded: tokens at the end of each row that decoding appends.
      batch_size: rows decoded at a time.
      seed: of the pass keys.
      dtype: arithmetic of the base model; None: bfloat16, on a CPU float32.
      output: folder for scores.json; None: none is written.
    """

    model: str = tiny_lm.NAME
    gates: tuple[str, ...] = ()
    text: Path | None = None
    policies: tuple[PolicyArgument, ...] = (TopK(0.1), TopK(0.2), TopK(0.4))
    methods: tuple[Method, ...] = tuple(Method)
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
                    f"Methods are compared by policies that rank blocks (topk, budget, threshold, mass); got {policy}. "
                    "Dense attention is measured anyway."
                )


def evaluate(config: EvalConfig) -> list[Score]:
    """Prints the table, writes scores.json if an output folder is given, and returns the scores.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: model, gates or text are not there.
      ValueError: settings, model, gates and text do not fit each other.
    """
    from seer_jax.models.pretrained import from_pretrained, load_tokenizer

    text = (config.text or tiny_lm.path() / "eval_text.txt").read_text(encoding="utf-8")
    model = from_pretrained(config.model, config.gates, dtype=config.dtype or DType.default())
    rows = make_rows(config, load_tokenizer(config.model), text, model.config.vocab_size)
    console, scores = Console(), []
    settings = [Setting(policy_name(policy), policy) for policy in config.policies]
    for score in compare(
        model, rows, settings, methods=config.methods, phases=config.phases, batch_size=config.batch_size
    ):
        scores.append(score)
        console.print(score_line(score), highlight=False, soft_wrap=True)
    print_scores(console, scores)
    if config.output is not None:
        path = config.output / "scores.json"
        write_scores(path, scores, model=config.model, gates=config.gates, length=config.length, seed=config.seed)
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    return scores


def make_rows(config: EvalConfig, tokenizer: Tokenizer, text: str, vocab_size: int) -> Rows:
    """Windows and pass-key prompts as the configuration wants them."""
    tokens = np.array(tokenizer.encode(text, special_tokens=False))
    prompts = passkey_prompts(
        tokenizer,
        tokens,
        json.loads((tiny_lm.path() / "words.json").read_text())["eval"],
        length=config.length,
        count=config.passkeys,
        vocab_size=vocab_size,
        seed=config.seed,
        distractors=config.distractors,
    )
    return Rows(text_windows(tokens, config.length, config.windows), prompts, config.decoded)


def policy_name(policy: Policy) -> str:
    """Head of a column: the density in per cent, or the policy as on a command line."""
    if isinstance(policy, TopK) and not policy.dense_layers:
        return f"{policy.density:.0%}"
    return write_policy(policy)


def score_line(score: Score) -> str:
    """One score as it comes in."""
    method = score.title if score.method is None else f"{score.title}, {score.setting}"
    found = f", pass keys {score.passkey:.0%}" if score.prompts else ""
    return (
        f"{score.phase} {method}: perplexity {score.perplexity:.3f}{found}, blocks read {score.kept:.1%} "
        f"({score.seconds:.1f} s)"
    )

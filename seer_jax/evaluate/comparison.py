"""Ways to choose blocks, compared on the same rows: held-out text for perplexity, pass-key prompts for retrieval."""

import concurrent.futures
import dataclasses
import enum
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from seer_jax.evaluate.passkey import PassKeyPrompt
from seer_jax.evaluate.scoring import TokenScores, perplexity, read_prompts, score_decoded, score_prompts
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.scorers import SCORERS, Scorer


class Phase(enum.StrEnum):
    """Where a policy works: on all tokens of a prompt at once, or on tokens that are appended one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"


class Method(enum.StrEnum):
    """What ranks the blocks; the names are those of the command line."""

    GATE = "gate"
    WINDOW = "window"
    RANDOM = "random"
    ORACLE = "oracle"

    @property
    def scorer(self) -> Scorer:
        """As policies take it."""
        return SCORERS[self]()

    @property
    def title(self) -> str:
        """As tables show it."""
        return {"gate": "learned gate", "window": "sink+window", "random": "random", "oracle": "oracle"}[self]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How many blocks are kept.

    Attributes:
      name: as tables show it, for example "10%".
      policy: of any scorer, which each method replaces by its own.
    """

    name: str
    policy: Policy

    def of(self, method: Method) -> Policy:
        """The policy with the method's ranking.

        The last rows of a prompt are as sparse as the others here: they hold the question, which would else read the whole
        prompt densely and find any pass key.
        """
        changes: dict[str, Any] = {"scorer": method.scorer}
        if hasattr(self.policy, "dense_last_rows"):
            changes["dense_last_rows"] = 0
        return dataclasses.replace(self.policy, **changes)


@dataclasses.dataclass(frozen=True)
class Score:
    """What one way to choose blocks came to.

    Attributes:
      phase, method, setting: which one; method None: dense, every block.
      kept: measured share of the blocks in sight that were read, mean over rows and layers.
      perplexity: on the text windows.
      tokens: how many tokens of them were scored.
      passkey: share of the pass-key prompts whose answer greedy decoding gets exactly right.
      passkey_tokens: share of the answers' single tokens that are right (given the right ones before).
      prompts: pass-key prompts.
      seconds: what the measurement took, compilation included.
    """

    phase: Phase
    method: Method | None
    setting: str
    kept: float
    perplexity: float
    tokens: int
    passkey: float
    passkey_tokens: float
    prompts: int
    seconds: float

    @property
    def title(self) -> str:
        """Of the method, as tables show it."""
        return "dense" if self.method is None else self.method.title


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is scored: windows of text and pass-key prompts, all of the same length.

    Attributes:
      windows: for perplexity.
      prompts: for retrieval.
      decoded: tokens at the end of each row that the decode policies append one at a time, after dense attention over what
        comes before; those but the first are scored. Covers the question and the answer of the prompts.
    """

    windows: Int[np.ndarray, "n T"]
    prompts: Sequence[PassKeyPrompt]
    decoded: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.decoded < self.length:
            raise ValueError(f"Decoded tokens are at least 2 and leave a prompt; got {self.decoded} of {self.length}.")
        longest = max((p.answer_length for p in self.prompts), default=0)
        if self.decoded <= longest:
            raise ValueError(f"The decoded tokens cover the answers of {longest} tokens; got decoded={self.decoded}.")

    @property
    def length(self) -> int:
        """T, tokens per row."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> Int[np.ndarray, "rows T"]:
        """The windows, then the prompts."""
        return np.concatenate([self.windows, *(p.tokens[None] for p in self.prompts)]).astype(np.int32)


def compare(
    model: Transformer,
    rows: Rows,
    settings: Sequence[Setting],
    *,
    methods: Sequence[Method] = tuple(Method),
    phases: Sequence[Phase] = tuple(Phase),
    batch_size: int = 8,
    workers: int = 1,
) -> Iterator[Score]:
    """Scores dense attention, then each method at each setting, phase by phase.

    Prefill: one pass over each row with the policy, as the recipe of the bundled model measures. Decode: all methods start from
    the same cache, that of dense attention over all but the last tokens of the rows; those are then appended one at a time.
    Dense decoding computes what dense prefill does, so its scores are those of the dense pass at the same tokens.

    Args:
      model: with the gates that the methods need; `Method.GATE` is left out of a phase that the model has no gate for.
      rows: what is scored.
      settings: how many blocks are kept.
      methods, phases: which ones.
      batch_size: rows that are decoded at a time. Prompts go one by one: each fills the device.
      workers: measurements at a time. Two keep the cores of a CPU busy while one of them compiles; numbers stay the same.

    Yields:
      Scores as they are ready, the dense one of each phase first.
    """
    tokens, started = rows.tokens, time.monotonic()
    gates = {Phase.PREFILL: model.prefill_gate, Phase.DECODE: model.decode_gate}
    if Phase.DECODE in phases:
        dense, prompts = _read(model, rows, batch_size)
    else:
        dense, prompts = _score_prompts(model, tokens, Dense()), []
    for phase in phases:
        if phase is Phase.PREFILL:
            measure = functools.partial(_score_prompts, model, tokens)
            yield _summary(rows, dense, started, phase, None, "dense")
        else:
            measure = functools.partial(_score_decoded, model, prompts)
            yield _summary(rows, _last(dense, rows.decoded - 1), started, phase, None, "dense")
        used = [method for method in methods if method is not Method.GATE or gates[phase] is not None]

        def one(choice: tuple[Setting, Method], phase: Phase = phase, measure: Measure = measure) -> Score:
            started, (setting, method) = time.monotonic(), choice
            return _summary(rows, measure(setting.of(method)), started, phase, method, setting.name)

        yield from _mapped(one, itertools.product(settings, used), workers)


def _mapped[X, Y](function: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Y]:
    """`map` with threads; what has not begun when the caller stops is dropped."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _score_prompts(model: Transformer, tokens: np.ndarray, policy: Policy) -> TokenScores:
    return _concatenate([jax.device_get(score_prompts(model, row[None], policy)) for row in tokens])


Measure = Callable[[Policy], TokenScores]
_Prompts = list[tuple[Cache, np.ndarray]]  # caches of a batch of rows, and the tokens that come next


def _read(model: Transformer, rows: Rows, batch_size: int) -> tuple[TokenScores, _Prompts]:
    """Dense attention: scores of the whole rows, and the caches of all but their last tokens."""
    first = rows.length - rows.decoded
    batches = [rows.tokens[i : i + batch_size] for i in range(0, len(rows.tokens), batch_size)]
    read = [read_prompts(model, batch, keep=first) for batch in batches]
    prompts = [(cache, batch[:, first:]) for (_, cache), batch in zip(read, batches, strict=True)]
    return _concatenate([jax.device_get(scores) for scores, _ in read]), prompts


def _score_decoded(model: Transformer, prompts: _Prompts, policy: Policy) -> TokenScores:
    return _concatenate([jax.device_get(score_decoded(model, cache, tokens, policy)) for cache, tokens in prompts])


def _concatenate(parts: Sequence[TokenScores]) -> TokenScores:
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _last(scores: TokenScores, count: int) -> TokenScores:
    return dataclasses.replace(scores, nll=scores.nll[:, -count:], best=scores.best[:, -count:])


def _summary(
    rows: Rows, scores: TokenScores, started: float, phase: Phase, method: Method | None, setting: str
) -> Score:
    windows = len(rows.windows)
    nll, best = np.asarray(scores.nll), np.asarray(scores.best)
    right = [row[-p.answer_length :] for row, p in zip(best[windows:], rows.prompts, strict=True)]
    return Score(
        phase=phase,
        method=method,
        setting=setting,
        kept=float(np.mean(scores.kept)),
        perplexity=perplexity(nll[:windows]),
        tokens=nll[:windows].size,
        passkey=float(np.mean([r.all() for r in right])) if right else math.nan,
        passkey_tokens=float(np.mean(np.concatenate(right))) if right else math.nan,
        prompts=len(right),
        seconds=time.monotonic() - started,
    )

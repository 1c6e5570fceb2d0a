"""Comparison of scorers on the same rows: held-out text for perplexity, pass-key prompts for retrieval."""

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

from seer_jax.evaluate.rows import EvalRows
from seer_jax.evaluate.scoring import TokenScores, perplexity, read_prompts, score_decoded, score_prompts
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import write_policy
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import RankingPolicy, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Random, Scorer, SinkWindow


class Phase(enum.StrEnum):
    """Where a policy works: on all tokens of a prompt at once, or on tokens that are appended one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass(frozen=True)
class SparsityLevel:
    """How many blocks are kept.

    Attributes:
      name: head of a table's column, for example "10%"; see `level_name`.
      policy: of any scorer; each method of a comparison takes its place.
      phases: phases that are measured at this level.
    """

    name: str
    policy: RankingPolicy
    phases: tuple[Phase, ...] = tuple(Phase)

    def policy_of(self, scorer: Scorer) -> RankingPolicy:
        """The policy with another scorer.

        Its `dense_last_rows` is 0: those rows hold the question, which would otherwise read the whole prompt densely and find any
        pass key.
        """
        policy: Any = self.policy  # every rule is a dataclass
        rows = dict(dense_last_rows=0) if hasattr(policy, "dense_last_rows") else {}
        return dataclasses.replace(policy, scorer=scorer, **rows)


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of one method at one level.

    Attributes:
      phase: what was sparse.
      method: name of the scorer; None: dense attention.
      level: name of the level; "dense" for dense attention.
      kept: measured share of the visible blocks that attention read, mean over rows and layers.
      perplexity: on the text windows.
      tokens: number of their tokens that were scored.
      passkey: share of the pass-key prompts whose answer greedy decoding gets exactly right.
      passkey_tokens: share of the answers' single tokens that are right (given the right ones before).
      prompts: number of pass-key prompts.
      seconds: duration of the measurement, compilation included.
    """

    phase: Phase
    method: str | None
    level: str
    kept: float
    perplexity: float
    tokens: int
    passkey: float
    passkey_tokens: float
    prompts: int
    seconds: float

    @property
    def title(self) -> str:
        """Title of the method in tables."""
        return "dense" if self.method is None else SCORERS[self.method].title


def all_methods() -> tuple[Scorer, ...]:
    """Every registered scorer: the gate, the baselines, further ones, and last the oracle, their upper bound."""
    first = (LearnedGate.name, SinkWindow.name, Random.name)
    others = (name for name in SCORERS if name not in (*first, Oracle.name))
    return tuple(SCORERS[name]() for name in (*first, *others, Oracle.name))


def level_name(policy: Policy) -> str:
    """Name of a policy's level: the density in per cent, or the policy as on a command line."""
    if isinstance(policy, TopK) and not policy.dense_layers:
        return f"{policy.density:.0%}"
    return write_policy(policy)


def recommended_levels(model: Transformer) -> list[SparsityLevel]:
    """The policies that the model's gates recommend, each for the phase of its gate; dense ones are left out."""
    policies = {phase: None if gate is None else gate.recommended for phase, gate in _gates(model).items()}
    return [
        SparsityLevel(write_policy(policy), policy, (phase,))
        for phase, policy in policies.items()
        if isinstance(policy, RankingPolicy)
    ]


def compare(
    model: Transformer,
    rows: EvalRows,
    levels: Sequence[SparsityLevel],
    *,
    methods: Sequence[Scorer] | None = None,
    phases: Sequence[Phase] = tuple(Phase),
    batch_size: int = 8,
    workers: int = 1,
) -> Iterator[Score]:
    """Scores dense attention, then each method at each level, phase by phase.

    Prefill: one pass over each row with the policy. Decode: all methods start from the same cache, that of dense attention over
    all but the last tokens of the rows; those are then appended one at a time. Dense decoding computes the same as dense
    prefill, so its scores are those of the dense pass at the same tokens.

    Args:
      model: with the gates that the methods need; a method that needs a gate is left out of a phase for which the model has none.
      rows: what is scored.
      levels: how many blocks are kept.
      methods: registered scorers that rank the blocks; None: `all_methods()`.
      phases: what is sparse.
      batch_size: rows that are decoded at a time. Prompts are read one by one, since each fills the device.
      workers: measurements at a time. Two keep the cores of a CPU busy while one of them compiles; the results are the same.

    Yields:
      Scores as soon as they are measured, the dense one of each phase first.

    Raises:
      ValueError: a method is not registered.
    """
    methods = all_methods() if methods is None else methods
    for method in methods:
        if SCORERS.get(method.name) is not type(method):
            raise ValueError(
                f"Methods must be registered scorers ({', '.join(SCORERS)}); got {method!r}. "
                "Register its class (seer_jax.selection.scorers.register)."
            )
    return _compare(model, rows, levels, methods, phases, batch_size, workers)


def _compare(
    model: Transformer,
    rows: EvalRows,
    levels: Sequence[SparsityLevel],
    methods: Sequence[Scorer],
    phases: Sequence[Phase],
    batch_size: int,
    workers: int,
) -> Iterator[Score]:
    tokens, started = rows.tokens, time.monotonic()
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
        used = [method for method in methods if not method.needs_gate or _gates(model)[phase] is not None]

        def one(pair: tuple[SparsityLevel, Scorer], phase: Phase = phase, measure: Measure = measure) -> Score:
            started, (level, method) = time.monotonic(), pair
            return _summary(rows, measure(level.policy_of(method)), started, phase, method.name, level.name)

        yield from _mapped(one, itertools.product([level for level in levels if phase in level.phases], used), workers)


def _gates(model: Transformer) -> dict[Phase, Any]:
    return {Phase.PREFILL: model.prefill_gate, Phase.DECODE: model.decode_gate}


def _mapped[X, Y](function: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Y]:
    """`map` in threads; items that have not started when the caller stops are dropped."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _score_prompts(model: Transformer, tokens: np.ndarray, policy: Policy) -> TokenScores:
    return _concatenate([jax.device_get(score_prompts(model, row[None], policy)) for row in tokens])


Measure = Callable[[Policy], TokenScores]
_Prompts = list[tuple[Cache, np.ndarray]]  # caches of a batch of rows, and the tokens that come next


def _read(model: Transformer, rows: EvalRows, batch_size: int) -> tuple[TokenScores, _Prompts]:
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
    rows: EvalRows, scores: TokenScores, started: float, phase: Phase, method: str | None, level: str
) -> Score:
    windows = len(rows.windows)
    nll, best = np.asarray(scores.nll), np.asarray(scores.best)
    right = [row[-p.answer_length :] for row, p in zip(best[windows:], rows.prompts, strict=True)]
    return Score(
        phase=phase,
        method=method,
        level=level,
        kept=float(np.mean(scores.kept)),
        perplexity=perplexity(nll[:windows]),
        tokens=nll[:windows].size,
        passkey=float(np.mean([r.all() for r in right])) if right else math.nan,
        passkey_tokens=float(np.mean(np.concatenate(right))) if right else math.nan,
        prompts=len(right),
        seconds=time.monotonic() - started,
    )

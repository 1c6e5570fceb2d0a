"""Comparison of scorers on the same rows: held-out text for perplexity, pass-key prompts for retrieval."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seer_jax.evaluate.levels import Phase, SparsityLevel, gates_by_phase
from seer_jax.evaluate.passkey import PassKeyPrompt
from seer_jax.evaluate.rows import EvalRows
from seer_jax.evaluate.score import PromptScore, Score, WindowScore
from seer_jax.evaluate.scoring import (
    TokenScores,
    concatenate_scores,
    read_prompts,
    score_decoded,
    score_each,
    score_prompts,
    score_windows,
)
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Random, Scorer, SinkWindow

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one score of a comparison is of.

    Attributes:
      phase, method, level: as in `Score`.
      policy: that runs.
    """

    phase: Phase
    method: str | None
    level: str
    policy: Policy

    @property
    def key(self) -> tuple[Phase, str | None, str]:
        """What tells the scores of a comparison apart."""
        return self.phase, self.method, self.level

    @property
    def saved(self) -> dict[str, Any]:
        """The policy as JSON."""
        return policy_to_json(self.policy)


def all_methods() -> tuple[Scorer, ...]:
    """What is compared where no methods are named: the gate, the baselines, scorers of the caller's own, and last the oracle, their
    upper bound. The published heuristics are compared where they are named."""
    first = (LearnedGate.name, SinkWindow.name, Random.name)
    others = (name for name, kind in SCORERS.items() if kind.by_default and name not in (*first, Oracle.name))
    return tuple(SCORERS[name]() for name in (*first, *others, Oracle.name))


def plan_measurements(
    model: Transformer,
    levels: Sequence[SparsityLevel],
    *,
    methods: Sequence[Scorer] | None = None,
    phases: Sequence[Phase] = tuple(Phase),
) -> list[Measurement]:
    """What `compare` will measure, in its order and checked against the model: dense attention first in each phase.

    Equal measurements come once. A method is left out of a phase that it has no scores for, or whose gate it needs and the model lacks.

    Args:
      model: with weights, or with shapes alone.
      levels, methods, phases: see `compare`.

    Raises:
      ValueError: a method is not registered, a policy does not fit the model, or two levels that differ have one name.
    """
    methods = all_methods() if methods is None else methods
    planned: dict[tuple[Phase, str | None, str], Measurement] = {}
    for phase in dict.fromkeys(phases):
        found = [Measurement(phase, None, DENSE, Dense())]
        for level in levels:
            used = methods if level.methods is None else level.methods
            _check_registered(used)
            if phase in level.phases:
                found += [
                    Measurement(phase, method.name, level.name, level.policy_of(method))
                    for method in used
                    if works(model, method, phase)
                ]
        for one in found:
            check_policy(model, one.phase, one.policy)
            first = planned.setdefault(one.key, one)
            if first.saved != one.saved:
                raise ValueError(
                    f"Each level must have a name of its own; got {one.level!r} for {first.policy} and {one.policy}. Rename one."
                )
    return list(planned.values())


def _check_registered(methods: Sequence[Scorer]) -> None:
    for method in methods:
        if SCORERS.get(method.name) is not type(method):
            raise ValueError(
                f"Methods must be registered scorers ({', '.join(SCORERS)}); got {method!r}. "
                "Register its class (seer_jax.selection.scorers.register)."
            )


def works(model: Transformer, method: Scorer, phase: Phase) -> bool:
    """Whether a method has scores for a phase, and the model the gate that it may need there."""
    return phase in method.phases() and (not method.needs_gate or gates_by_phase(model)[phase] is not None)


def check_policy(model: Transformer, phase: Phase, policy: Policy) -> None:
    """Raises ValueError where a policy does not fit the model in a phase."""
    heads = model.config.num_heads if phase is Phase.PREFILL else model.config.num_kv_heads
    model.segments(policy, gates_by_phase(model)[phase], heads, phase)


def check_context(model: Transformer, length: int, *, beyond_context: bool) -> None:
    """Raises ValueError where rows of `length` tokens exceed the model's context (`ModelConfig.context`) and may not."""
    context = model.config.context
    if length > context and not beyond_context:
        raise ValueError(
            f"`length`, the tokens of a row, must fit the model's context of {context} tokens; got {length}. Lower it, load the model with "
            "a RoPE scaling for longer contexts, or pass beyond_context=True."
        )


def compare(
    model: Transformer,
    rows: EvalRows,
    levels: Sequence[SparsityLevel],
    *,
    methods: Sequence[Scorer] | None = None,
    phases: Sequence[Phase] = tuple(Phase),
    batch_size: int = 8,
    workers: int = 1,
    done: Sequence[Score] = (),
    beyond_context: bool = False,
) -> Iterator[Score]:
    """Scores dense attention, then each method at each level, phase by phase.

    Prefill: one pass over each row with the policy. Decode: every token of a window is decoded by the policy, from the first on, in one
    pass (`score_windows`). For pass keys all methods start from the same cache, that of dense attention over all but the last
    `rows.decoded` tokens of the prompts; those are then appended one at a time. Dense decoding computes the same as dense prefill, so
    that both have the scores of one pass.

    Args:
      model: with the gates that the methods need. A method is left out of a phase that it has no scores for, or whose gate it needs
        and the model lacks.
      rows: what is scored.
      levels: how many blocks are kept; a level that names methods is measured with them alone.
      methods: registered scorers that rank the blocks; None: `all_methods()`.
      phases: what is sparse.
      batch_size: pass-key prompts that are decoded at a time. Rows are read one by one, since each fills the device, on a mesh one by
        each of the devices along data and fsdp.
      workers: measurements at a time. Two keep the cores of a CPU busy while one of them compiles; the results are the same. 1 on a
        mesh, whose devices must all run the programs in one order.
      done: scores of an earlier comparison of the same model on the same rows; they are yielded as they are and not measured again.
      beyond_context: allow rows of more tokens than the model's context.

    Yields:
      Scores in the order of `plan_measurements`, as soon as they are measured.

    Raises:
      ValueError: see `plan_measurements` and `check_context`; or there are no workers or no rows at a time, or several workers for a
        model on a mesh.
    """
    for name, count in (("batch_size", batch_size), ("workers", workers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}.")
    if workers > 1 and model.layout is not None:
        raise ValueError(f"workers must be 1 for a model on a mesh; got {workers}. Leave it out.")
    check_context(model, rows.length, beyond_context=beyond_context)
    planned = plan_measurements(model, levels, methods=methods, phases=phases)
    return _compare(model, rows, planned, batch_size, workers, {score.key: score for score in done})


def _compare(
    model: Transformer,
    rows: EvalRows,
    planned: Sequence[Measurement],
    batch_size: int,
    workers: int,
    done: dict[tuple[Phase, str | None, str], Score],
) -> Iterator[Score]:
    todo, started = [one for one in planned if one.key not in done], time.monotonic()
    read, caches = None, []
    if rows.prompts and any(one.phase is Phase.DECODE for one in todo):
        read, caches = _read_prompts(model, rows, batch_size)
    dense = None
    if any(one.method is None for one in todo):
        prompts = score_each(score_prompts, model, rows.prompt_tokens, Dense()) if read is None else read
        dense = _RowScores(score_each(score_prompts, model, rows.windows, Dense()), prompts)

    def measure(one: Measurement) -> Score:
        begun = time.monotonic()
        if one.method is None:
            assert dense is not None
            return _score(rows, dense, started, one)
        if one.phase is Phase.PREFILL:
            parts = [
                score_each(score_prompts, model, tokens, one.policy) for tokens in (rows.windows, rows.prompt_tokens)
            ]
        else:
            parts = [
                score_each(score_windows, model, rows.windows, one.policy),
                _decode_prompts(model, caches, one.policy),
            ]
        return _score(rows, _RowScores(*parts), begun, one)

    measured = _mapped(measure, todo, workers)
    for one in planned:
        yield done[one.key] if one.key in done else next(measured)


def _mapped[X, Y](function: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Y]:
    """`map`, in threads where there are several; items that have not started when the caller stops are dropped."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupted command says so at once


class _RowScores(NamedTuple):
    """Scores of the windows, and of the prompts if there are any."""

    windows: TokenScores | None
    prompts: TokenScores | None


_Caches = list[tuple[Cache, np.ndarray]]  # of a batch of prompts, and the tokens that come next


def _read_prompts(model: Transformer, rows: EvalRows, batch_size: int) -> tuple[TokenScores | None, _Caches]:
    """Dense attention: scores of the whole prompts, and the caches of all but their last tokens."""
    first, tokens = rows.length - rows.decoded, rows.prompt_tokens
    batches = [tokens[i : i + batch_size] for i in range(0, len(tokens), batch_size)]
    read = [read_prompts(model, batch, keep=first) for batch in batches]
    caches = [(cache, batch[:, first:]) for (_, cache), batch in zip(read, batches, strict=True)]
    return concatenate_scores([jax.device_get(scores) for scores, _ in read]), caches


def _decode_prompts(model: Transformer, caches: _Caches, policy: Policy) -> TokenScores | None:
    return concatenate_scores([jax.device_get(score_decoded(model, cache, tokens, policy)) for cache, tokens in caches])


def _score(rows: EvalRows, scores: _RowScores, started: float, one: Measurement) -> Score:
    windows, prompts = scores
    assert windows is not None  # there is always a window
    losses, kept = np.asarray(windows.nll, np.float64).mean(-1), np.asarray(windows.kept, np.float64)
    return Score(
        phase=one.phase,
        method=one.method,
        level=one.level,
        windows=tuple(WindowScore(float(loss), float(share)) for loss, share in zip(losses, kept, strict=True)),
        prompts=() if prompts is None else tuple(map(_prompt_score, rows.prompts, prompts.best, prompts.kept)),
        tokens=windows.nll.size,
        seconds=time.monotonic() - started,
        policy=policy_to_json(one.policy),
    )


def _prompt_score(prompt: PassKeyPrompt, best: np.ndarray, kept: np.floating) -> PromptScore:
    """Of the prompt's last tokens, its answer."""
    right = best[-prompt.answer_length :]
    return PromptScore(prompt.depth, bool(right.all()), float(right.mean()), float(kept))

"""`seer-jax bench ground-truth`: dense attention with the scores that gates are trained on, beside dense attention alone."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import AttentionWithScores, attention_with_block_scores
from pallas_kernels.block_ground_truth.cases import Case
from pallas_kernels.cases import Heads
from seer_jax.bench.configs import GroundTruthBench
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.measurement import DenseTimes, Measurement, Outcome, measure
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import DENSE, ERRORS, MILLISECONDS, Column, Table, report
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.inference.memory import GIB

GROUND_TRUTH = Table(
    "ground truth",
    "Dense attention with block scores",
    (
        *ERRORS,
        Column(
            "scores\nerror", "scores_error", ".1e", "largest error of the scores on those rows, over a row's largest"
        ),
        *(MILLISECONDS, DENSE),
        Column("times\ndense", "times_dense", ".3f", "ms over dense attention's ms"),
        Column("TFLOP/s", "effective_tflops", ".3g", "4 D flop for each key that a query sees, over the time"),
        Column("extra\nGiB", "extra_gib", ".3f", "memory besides arguments and results, as the compiler lays it out"),
    ),
)
PANEL = Panel(
    "dense attention with block scores",
    GROUND_TRUTH.name,
    colour=lambda m: f"scores of {m.case.partition(', ')[2]}",
    style=lambda m: f"{m.settings['block_size']} tokens a block",
    y="times_dense",
    y_label="time over that of dense attention",
)


def bench_ground_truth(config: GroundTruthBench) -> list[Measurement]:
    """Measures and reports, see `report`."""
    return report(config, measure_ground_truth(config), (GROUND_TRUTH,), (PANEL,))


def measure_ground_truth(config: GroundTruthBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    dense_times = DenseTimes()
    for length in config.lengths:
        for wanted, statistic in _asked(config):
            blocks, tokens = (wanted in (scores, "both") for scores in ("blocks", "tokens"))
            name = f"{length}, {wanted}" + (" by mass" if statistic == "mass" else "")
            scores: dict[str, Any] = dict(block_scores=blocks, token_scores=tokens, statistic=statistic)
            case = Case(name, config.heads, length, **scores)
            chunk = min(config.chunk, length) if tokens else length  # all at once they would be [B, K, T, Sb]
            settings = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
            settings |= {"implementation": config.implementation, "chunk": chunk}
            del settings["name"]
            run = functools.partial(_check_and_time, config, case, chunk, dense_times)
            yield measure(GROUND_TRUTH.name, case.name, settings, run, required=config.implementation is not None)


def _asked(config: GroundTruthBench) -> list[tuple[str, str]]:
    """Which scores, and of what; attention without scores has no statistic, and is measured once."""
    return [
        (wanted, statistic)
        for wanted in config.wanted
        for statistic in (("max",) if wanted == "neither" else config.statistics)
    ]


def _check_and_time(config: GroundTruthBench, case: Case, size: int, dense_times: DenseTimes) -> Outcome:
    key_case, *keys = jax.random.split(jax.random.key(config.seed), 3)
    arguments = case.arguments(key_case)
    q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
    attend = jax.jit(functools.partial(attention_with_block_scores, **arguments, implementation=config.implementation))
    chunks = [(q[:, at : at + size], jnp.int32(at)) for at in range(0, case.length, size)]
    ends = {0: chunks[0], len(chunks) - 1: chunks[-1]}.values()
    programs = {q.shape[1]: attend.lower(q, k, v, query_offset=at).compile() for q, at in ends}

    def run(q: Array, at: Array) -> AttentionWithScores:
        return programs[q.shape[1]](q, k, v, query_offset=at)

    def run_all() -> AttentionWithScores:
        for chunk in chunks[:-1]:
            run(*chunk)
        return run(*chunks[-1])

    lengths = jnp.full(case.batch, case.length, jnp.int32)
    errors: dict[str, float | None] = {"scores_error": None}
    for key, chunk in zip(keys, ends, strict=False):
        call = AttentionCall.dense(chunk[0], k, v, chunk[1], lengths)
        outcome = check_result(key, call, run(*chunk), run(*chunk), statistic=case.statistic)
        errors |= {name: max(x or 0.0, errors.get(name) or 0.0) for name, x in outcome.results.items()}
        if outcome.failure is not None:
            return outcome._replace(results=errors)
    timing = time_calls(run_all)
    dense, note = dense_times(q, k, v)
    results = {
        "effective_tflops": case.batch * causal_flops(case.heads, case.length) / timing.milliseconds / 1e9,
        "dense_milliseconds": dense,
        "times_dense": dense and timing.milliseconds / dense,
        "extra_gib": max(getattr(x.memory_analysis(), "temp_size_in_bytes", 0) for x in programs.values()) / GIB,
    }
    return Outcome({**errors, **timing._asdict(), **results}, note)


def causal_flops(heads: Heads, length: int) -> float:
    """4 D for each query of each head and each key that it sees."""
    return 2.0 * heads.heads * heads.head_dim * length * (length + 1)

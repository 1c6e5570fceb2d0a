"""`seer-jax bench ground-truth`: dense attention with the scores that gates are trained on, beside dense attention alone."""

import dataclasses
import enum
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import BlockIndices, attention_with_block_scores
from pallas_kernels.backends import Implementation
from pallas_kernels.block_ground_truth.api import AttentionWithScores
from pallas_kernels.block_ground_truth.cases import Case
from pallas_kernels.cases import Heads
from seer_jax.bench.harness.baseline import DenseTimes
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.config import BLOCK, BenchConfig
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure
from seer_jax.bench.harness.plots import Panel
from seer_jax.bench.harness.report import report
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.bench.harness.tables import DENSE, ERRORS, MILLISECONDS, Column, Table
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
    colour=lambda m: m.case.partition(", ")[2],
    style=lambda m: "scores",
    y="times_dense",
    y_label="time over dense attention's",
)


class Wanted(enum.StrEnum):
    """Which scores are asked for."""

    BLOCKS = "blocks"
    TOKENS = "tokens"
    BOTH = "both"
    NEITHER = "neither"


@dataclasses.dataclass(frozen=True)
class GroundTruthBench(BenchConfig):
    """Measures dense attention with block scores, which the training of gates runs in each layer, beside dense attention alone.

    Each result is held against float32 before it is timed. The command fails if one is wrong.

    Attributes:
      wanted: scores to ask for: blocks (targets of a prefill gate), tokens (of a decode gate), both, or neither.
      chunk: queries that are taken at a time where token scores are asked for.
      implementation: of the operation; None: the best one here.
    """

    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    wanted: tuple[Wanted, ...] = tuple(Wanted)
    chunk: int = 8192
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        self.check_lengths(1)
        if self.chunk < BLOCK or self.chunk % BLOCK:
            raise ValueError(f"chunk must be a multiple of the {BLOCK} tokens of a block; got {self.chunk}.")


def bench_ground_truth(config: GroundTruthBench) -> list[Measurement]:
    """Prints the table, writes file and plot if they are asked for, and returns the measurements.

    Raises:
      ValueError: see `measure_ground_truth`.
    """
    return report(config, measure_ground_truth(config), (GROUND_TRUTH,), (PANEL,))


def measure_ground_truth(config: GroundTruthBench) -> Iterator[Measurement]:
    """Yields each measurement as soon as it is there.

    Raises:
      ValueError: a shape that the device is too slow for, or an implementation that does not exist.
    """
    config.check_device()
    dense_times = DenseTimes()
    for length in config.lengths:
        for wanted in config.wanted:
            case = Case(
                f"{length}, {wanted.value}",
                config.heads,
                length,
                block_scores=wanted in (Wanted.BLOCKS, Wanted.BOTH),
                token_scores=wanted in (Wanted.TOKENS, Wanted.BOTH),
            )
            # All at once, token scores would be [B, K, T, Sb].
            chunk = min(config.chunk, length) if case.token_scores else length
            settings = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
            settings |= {"implementation": config.implementation, "chunk": chunk}
            del settings["name"]
            run = functools.partial(_check_and_time, config, case, chunk, dense_times)
            required = config.implementation is not None
            yield measure(GROUND_TRUTH.name, case.name, settings, run, required=required)


def _check_and_time(config: GroundTruthBench, case: Case, size: int, dense_times: DenseTimes) -> Outcome:
    key_case, *keys = jax.random.split(jax.random.key(config.seed), 3)
    arguments = case.arguments(key_case)
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    chunks = [(q[:, at : at + size], jnp.int32(at)) for at in range(0, case.length, size)]
    operation = _Operation(case, config.implementation, k, v)
    errors: dict[str, float | None] = {}
    for key, chunk in zip(keys, {0: chunks[0], len(chunks) - 1: chunks[-1]}.values(), strict=False):
        checked = check_result(key, _call(*chunk, k, v), operation(*chunk), operation(*chunk))
        errors = {name: max(x or 0.0, errors.get(name) or 0.0) for name, x in checked.results.items()}
        if checked.failure is not None:
            return checked._replace(results=errors)

    def every_chunk() -> Any:
        for chunk in chunks[:-1]:
            operation(*chunk)
        return operation(*chunks[-1])

    timing = time_calls(every_chunk)
    dense = dense_times(q, k, v)
    results = (
        errors
        | timing.results
        | {
            "effective_tflops": case.batch * causal_flops(case.heads, case.length) / timing.milliseconds / 1e9,
            "dense_milliseconds": dense.milliseconds,
            "times_dense": dense.milliseconds and timing.milliseconds / dense.milliseconds,
            "extra_gib": operation.extra_bytes / GIB,
        }
    )
    return Outcome(results, dense.note)


def _call(q: Any, offset: Any, k: Any, v: Any) -> AttentionCall:
    """What the check holds a chunk against: every causal block."""
    blocks = BlockIndices.all_causal(
        q.shape[1], k.shape[1], block_size=BLOCK, query_offset=offset, batch=len(q), lists=1
    )
    return AttentionCall(q, k, v, blocks, offset, jnp.full(len(q), k.shape[1], jnp.int32))


class _Operation:
    """The operation, compiled once for each size of a chunk.

    Attributes:
      extra_bytes: memory that the largest chunk takes besides its arguments and results, as the compiler lays it out.
    """

    def __init__(self, case: Case, implementation: Implementation | None, k: Any, v: Any):
        def run(q: Any, k: Any, v: Any, offset: Any) -> AttentionWithScores:
            return attention_with_block_scores(
                q,
                k,
                v,
                block_size=case.block_size,
                block_scores=case.block_scores,
                token_scores=case.token_scores,
                query_offset=offset,
                implementation=implementation,
            )

        self._run, self._k, self._v = jax.jit(run), k, v
        self._compiled: dict[int, Any] = {}

    def __call__(self, q: Any, offset: Any) -> AttentionWithScores:
        size = q.shape[1]
        if size not in self._compiled:
            self._compiled[size] = self._run.lower(q, self._k, self._v, offset).compile()
        return self._compiled[size](q, self._k, self._v, offset)

    @property
    def extra_bytes(self) -> int:
        return max(compiled.memory_analysis().temp_size_in_bytes for compiled in self._compiled.values())


def causal_flops(heads: Heads, length: int) -> float:
    """4 D for each query of each head and each key that it sees."""
    return 2.0 * heads.heads * heads.head_dim * length * (length + 1)

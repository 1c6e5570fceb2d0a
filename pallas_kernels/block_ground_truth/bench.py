"""`attention_with_block_scores` measured: results are held against float32 before they are timed, with cuDNN's dense attention beside them."""

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import GIB, Measurement, first_line, guarded, time_calls
from pallas_kernels.block_ground_truth.api import AttentionWithScores, attention_with_block_scores
from pallas_kernels.block_ground_truth.cases import Case
from pallas_kernels.block_ground_truth.sampled_check import find_fault, sampled_errors
from pallas_kernels.block_sparse_attention.bench import dense_attention
from pallas_kernels.cases import Heads


class Wanted(enum.StrEnum):
    """Which scores are asked for."""

    BLOCKS = "blocks"
    TOKENS = "tokens"
    BOTH = "both"
    NEITHER = "neither"


def sweep(heads: Heads, lengths: Sequence[int], wanted: Sequence[Wanted]) -> list[Case]:
    """Whole sequences at each length, with the scores wanted."""
    return [
        Case(
            f"{length}, {what.value}",
            heads,
            length,
            block_scores=what in (Wanted.BLOCKS, Wanted.BOTH),
            token_scores=what in (Wanted.TOKENS, Wanted.BOTH),
        )
        for length in lengths
        for what in wanted
    ]


@dataclasses.dataclass
class Bench:
    """Measures cases. One object for a run: dense attention is timed once per length.

    Attributes:
      implementation: see `attention_with_block_scores`.
      chunk: queries that are taken at a time where token scores are asked for, as in training: all at once they would be
        [B, K, T, Sb]. The time is that of all chunks.
      seed: of the random inputs.
    """

    implementation: Implementation | None = None
    chunk: int = 8192
    seed: int = 0
    _dense: dict[tuple[Heads, int], tuple[float | None, str | None]] = dataclasses.field(default_factory=dict)

    def sweep(self, cases: Sequence[Case]) -> Iterator[Measurement]:
        """One measurement per case."""
        for case in cases:
            yield self.measure(case)

    def measure(self, case: Case) -> Measurement:
        """Checks and times one case."""
        numbers = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
        del numbers["name"]
        settings = numbers | {"implementation": self.implementation, "chunk": self._chunk(case)}
        blank = Measurement("ground truth", case.name, settings)
        return guarded(lambda: self._measure(case, blank), blank, required=self.implementation is not None)

    def _chunk(self, case: Case) -> int:
        return min(self.chunk, case.length) if case.token_scores else case.length

    def _measure(self, case: Case, blank: Measurement) -> Measurement:
        key_case, *keys = jax.random.split(jax.random.key(self.seed), 3)
        arguments = case.arguments(key_case)
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        size = self._chunk(case)
        chunks = [(q[:, at : at + size], jnp.int32(at)) for at in range(0, case.length, size)]
        call = _Calls(case, self.implementation, k, v)
        results: dict[str, float | None] = {}
        for key, chunk in zip(keys, {0: chunks[0], len(chunks) - 1: chunks[-1]}.values(), strict=False):
            result = call(*chunk)
            errors = sampled_errors(key, chunk[0], k, v, chunk[1], result)
            failure = find_fault(errors, result, call(*chunk))
            del result
            found = dict(zip(("error", "plain_error", "lse_error", "scores_error"), errors, strict=True))
            results = {name: max(x, results.get(name) or 0.0) for name, x in found.items()}
            if failure is not None:
                return dataclasses.replace(blank, results=results, failure=failure)

        def every_chunk() -> Any:
            for chunk in chunks[:-1]:
                call(*chunk)
            return call(*chunks[-1])

        timing = time_calls(every_chunk)
        dense, note = self._dense_milliseconds(case, q, k, v)
        results |= {
            "milliseconds": timing.milliseconds,
            "spread": timing.spread,
            "effective_tflops": case.batch * causal_flops(case.heads, case.length) / timing.milliseconds / 1e9,
            "dense_milliseconds": dense,
            "times_dense": None if dense is None else timing.milliseconds / dense,
            "extra_gib": call.extra_bytes / GIB,
        }
        return dataclasses.replace(blank, results=results, note=note)

    def _dense_milliseconds(self, case: Case, q: Any, k: Any, v: Any) -> tuple[float | None, str | None]:
        """Time of JAX's fastest dense causal attention on this device at the case's shape, or why there is none."""
        shape = case.heads, case.length
        if shape not in self._dense:
            try:
                self._dense[shape] = time_calls(dense_attention, q, k, v, None).milliseconds, None
            except (ValueError, RuntimeError) as error:  # NotImplementedError among them, and errors of the device
                self._dense[shape] = None, f"dense attention: {first_line(error)}"
        return self._dense[shape]


class _Calls:
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
        self.extra_bytes = 0

    def __call__(self, q: Any, offset: Any) -> AttentionWithScores:
        size = q.shape[1]
        if size not in self._compiled:
            compiled = self._run.lower(q, self._k, self._v, offset).compile()
            self._compiled[size] = compiled
            memory: Any = compiled.memory_analysis()
            self.extra_bytes = max(self.extra_bytes, memory.temp_size_in_bytes)
        return self._compiled[size](q, self._k, self._v, offset)


def causal_flops(heads: Heads, length: int) -> float:
    """4 D for each query of each head and each key that it sees."""
    return 2.0 * heads.heads * heads.head_dim * length * (length + 1)

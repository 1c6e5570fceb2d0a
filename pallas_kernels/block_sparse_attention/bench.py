"""`block_sparse_attention` measured: each result is held against float32 before it is timed, with cuDNN's dense attention beside it."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import Implementation
from pallas_kernels.bench import Measurement, first_line, guarded, time_calls
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.block_sparse_attention.sampled_check import find_fault, sampled_errors
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.cases import Heads

PACKAGE = "pallas_kernels.block_sparse_attention"
Call = Callable[..., tuple[Array, Array]]


def sweep(heads: Heads, lengths: Sequence[int], densities: Sequence[float]) -> list[Case]:
    """Aligned prompts at each length and density: blocks of 64 and 128 tokens, lists per head and per key/value head."""
    kinds = (("own", 64, None), ("own", 128, None), ("shared", 64, heads.kv_heads))
    return [
        Case(f"{length}, {b}x{b}, {kind}, {density:g}", heads, length, lists=lists, block_size=b, density=density)
        for kind, b, lists in kinds
        for length in lengths
        for density in densities
    ]  # fmt: skip


def odd_cases(heads: Heads, length: int, density: float = 0.1) -> list[tuple[Case, Case]]:
    """Calls that are harder than those of `sweep`, each with the aligned call that it is compared with."""
    base = Case(f"{length} tokens", heads, length, density=density)
    quarter, eighth = length // 4, length // 8
    batch = dataclasses.replace(base, name=f"4 x {quarter} tokens", num_queries=quarter, batch=4)
    lengths = (quarter, quarter - quarter // 8 - 1, quarter // 2 + 1, min(64, quarter))
    change = functools.partial(dataclasses.replace, base)
    return [
        (change(name=f"{length - 23} tokens", num_queries=length - 23), base),
        (dataclasses.replace(batch, name=f"4 rows of {', '.join(map(str, lengths))} tokens", lengths=lengths), batch),
        (change(name="head dim 64", heads=dataclasses.replace(heads, head_dim=64)), base),
        (change(name="as many key/value heads as heads", heads=dataclasses.replace(heads, kv_heads=heads.heads)), base),
        (change(name="float16", dtype="float16"), base),
        (change(name=f"the last {eighth} queries of {length}", num_queries=eighth, num_keys=length,
                query_offset=length - eighth), base),
    ]  # fmt: skip


@dataclasses.dataclass
class Bench:
    """Measures cases. One object for a run: dense attention is timed once per sizes, and no case twice.

    Attributes:
      implementation: see `block_sparse_attention`.
      config: name and configuration, one of the backend's `CONFIGS`; None: the backend's own choice.
      seed: of the random inputs.
    """

    implementation: Implementation | None = None
    config: tuple[str, Any] | None = None
    seed: int = 0
    _dense: dict[tuple, tuple[float | None, str | None]] = dataclasses.field(default_factory=dict)
    _done: dict[Case, Measurement] = dataclasses.field(default_factory=dict)

    def sweep(self, cases: Sequence[Case]) -> Iterator[Measurement]:
        """One measurement per case."""
        for case in cases:
            yield self.measure(case, "attention")

    def pairs(self, pairs: Sequence[tuple[Case, Case]]) -> Iterator[Measurement]:
        """One measurement per odd case; `share_of_aligned` is its rate over that of the aligned case."""
        for odd, aligned in pairs:
            other, found = (self.measure(case, "cases") for case in (aligned, odd))
            rate, aligned_rate = (m.results.get("effective_tflops") for m in (found, other))
            share = rate / aligned_rate if rate and aligned_rate else None
            results = {**found.results, "aligned_tflops": aligned_rate, "share_of_aligned": share}
            failure = found.failure or (other.failure and f"{aligned.name}: {other.failure}")
            yield dataclasses.replace(found, results=results, failure=failure)

    def measure(self, case: Case, table: str) -> Measurement:
        """Checks and times one case."""
        key = dataclasses.replace(case, name="")
        if key not in self._done:
            blank = Measurement(table, case.name, self.settings(case))
            named = self.implementation is not None and self.config is None  # who is asked for by name must be able
            self._done[key] = guarded(lambda: self._measure(case, blank), blank, required=named)
        return dataclasses.replace(self._done[key], table=table, case=case.name)

    def settings(self, case: Case) -> dict[str, Any]:
        """The case by numbers, and what runs it."""
        numbers = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
        numbers |= {"lists": case.lists or case.heads.heads, "num_keys": case.num_keys or case.num_queries}
        del numbers["name"]
        return numbers | {"implementation": self.implementation, "config": self.config and self.config[0]}

    def _measure(self, case: Case, blank: Measurement) -> Measurement:
        key_case, key_rows = jax.random.split(jax.random.key(self.seed))
        arguments = case.arguments(key_case)
        arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
        call = compiled(self.implementation, None if self.config is None else self.config[1], case.density)
        attend = jax.jit(lambda arguments: call(**arguments)[0])  # what is timed: inference asks for no lse
        result = call(**arguments)
        errors = sampled_errors(key_rows, arguments, *result)
        failure = find_fault(errors, arguments, result, (attend(arguments), call(**arguments)[1]))
        del result
        flops = listed_flops(arguments)
        density = listed_share(arguments)
        results: dict[str, float | None] = {"density": density, "error": errors.out, "plain_error": errors.plain}
        results["lse_error"] = errors.lse
        if failure is not None:
            return dataclasses.replace(blank, results=results, failure=failure)
        timing = time_calls(attend, arguments)
        dense, note = self._dense_milliseconds(case, arguments)
        results |= {
            "milliseconds": timing.milliseconds,
            "spread": timing.spread,
            "effective_tflops": flops / timing.milliseconds / 1e9,
            "dense_milliseconds": dense,
            "speedup": None if dense is None else dense / timing.milliseconds,
        }
        return dataclasses.replace(blank, results=results, note=note)

    def _dense_milliseconds(self, case: Case, arguments: dict[str, Any]) -> tuple[float | None, str | None]:
        """Time of JAX's fastest dense causal attention on this device at the case's sizes, or why there is none."""
        if case.query_offset or case.num_keys not in (None, case.num_queries):
            return None, "dense attention of JAX knows no query offset"
        shape = (case.heads, case.num_queries, case.batch, case.lengths, case.dtype)
        if shape not in self._dense:
            lengths = None if case.lengths is None else arguments["lengths"]
            try:
                timing = time_calls(dense_attention, arguments["q"], arguments["k"], arguments["v"], lengths)
                self._dense[shape] = timing.milliseconds, None
            except (
                ValueError,
                RuntimeError,
            ) as error:  # RuntimeError: NotImplementedError among them, and of the device
                self._dense[shape] = None, f"dense attention: {first_line(error)}"
        return self._dense[shape]


@functools.cache
def compiled(implementation: Implementation | None, config: Any | None, hint: float) -> Call:
    """The operation under `jax.jit`, giving (out, lse).

    Args:
      config: of the named backend, which is then called directly; None: the backend chooses.
      hint: the density that is expected.
    """
    if config is None:
        call = functools.partial(block_sparse_attention, return_lse=True, implementation=implementation, density=hint)
        return jax.jit(call)
    backend = importlib.import_module(f"{PACKAGE}.{implementation}").block_sparse_attention

    def run(q: Array, k: Array, v: Array, blocks: BlockIndices, query_offset: Array, lengths: Array) -> Any:
        offsets = jnp.broadcast_to(query_offset, lengths.sizes).astype(jnp.int32)
        numbers = dict(scale=q.shape[-1] ** -0.5, query_offset=offsets, lengths=lengths, density=hint)
        return backend(q, k, v, blocks, **numbers, config=config)

    return jax.jit(run)


@jax.jit
def dense_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], lengths: Int[Array, "B"] | None
) -> Float[Array, "B T H D"]:
    """cuDNN's on a GPU, XLA's elsewhere."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )


def listed_flops(arguments: dict[str, Any]) -> float:
    """4 b^2 D for each block on the list of a query head, whole also where the mask cuts it; rows beyond a sequence have none."""
    blocks, q = arguments["blocks"], arguments["q"]
    starts = _offsets(arguments) + np.arange(blocks.counts.shape[-1]) * blocks.block_size
    counts = np.where(starts < np.asarray(arguments["lengths"])[:, None, None], blocks.counts, 0)
    listed = counts.sum(dtype=np.int64) * q.shape[2] // counts.shape[1]
    return 4.0 * blocks.block_size**2 * q.shape[-1] * float(listed)


def listed_share(arguments: dict[str, Any]) -> float:
    """Listed blocks over those that each row could list, mean over the lists."""
    q, k, blocks = arguments["q"], arguments["k"], arguments["blocks"]
    b, counts = blocks.block_size, np.asarray(blocks.counts)
    ends = _offsets(arguments) + np.minimum((np.arange(counts.shape[-1]) + 1) * b, q.shape[1])
    in_sight = np.broadcast_to(-(-np.minimum(ends, k.shape[1]) // b), counts.sizes)
    return float((counts.sum(-1, dtype=np.int64) / in_sight.sum(-1, dtype=np.int64)).mean())


def _offsets(arguments: dict[str, Any]) -> Int[np.ndarray, "B 1 1"]:
    """On the host, where a new shape compiles nothing."""
    return np.broadcast_to(arguments["query_offset"], (len(arguments["q"]),))[:, None, None]

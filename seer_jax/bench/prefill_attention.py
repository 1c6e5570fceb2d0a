"""`block_sparse_attention` measured: each result is checked before it is timed, with dense attention beside it."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from pallas_kernels import BlockIndices, block_sparse_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.block_ground_truth.api import AttentionWithScores
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.cases import Heads
from seer_jax import tiny_lm
from seer_jax.bench.harness.baseline import Baseline, DenseTimes
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.measurement import Measurement, Outcome, measure
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.bench.harness.tables import DENSE, DENSITY, ERRORS, MILLISECONDS, SPEEDUP, Column, Table
from seer_jax.selection.rules import TopK

PACKAGE = "pallas_kernels.block_sparse_attention"
RATE = Column("eff.\nTFLOP/s", "effective_tflops", ".3g", "4 b^2 D flop for each listed block of a head, over the time")
ATTENTION = Table("attention", "Attention kernel", (DENSITY, *ERRORS, MILLISECONDS, RATE, DENSE, SPEEDUP))
ODD_CASES = Table(
    "cases",
    "Attention kernel, odd cases",
    (
        *(DENSITY, *ERRORS, MILLISECONDS, RATE),
        Column("aligned\nTFLOP/s", "aligned_tflops", ".3g", "rate of the aligned case beside it"),
        Column("of\naligned", "share_of_aligned", ".0%", "rate over that of the aligned case"),
        *(DENSE, SPEEDUP),
    ),
)
ODD_LENGTH = 32768
TRAINED_LENGTH = 8192  # tokens that the bundled model was trained to read


def aligned_cases(heads: Heads, lengths: Sequence[int], densities: Sequence[float]) -> list[Case]:
    """Aligned prompts at each length and density: blocks of 64 and 128 tokens, lists per head and per key/value head."""
    kinds = (("own", 64, None), ("own", 128, None), ("shared", 64, heads.kv_heads))
    return [
        Case(f"{length}, {b}x{b}, {kind}, {density:g}", heads, length, lists=lists, block_size=b, density=density)
        for kind, b, lists in kinds
        for length in lengths
        for density in densities
    ]


def odd_cases(heads: Heads, longest: int, *, density: float = 0.1, trained_density: float) -> list[tuple[Case, Case]]:
    """Calls that are harder than aligned ones, each with the aligned call that it is compared with.

    Args:
      longest: tokens of the longest prompt.
      density: of the random lists.
      trained_density: of the lists of a trained gate.
    """
    length, trained = min(ODD_LENGTH, longest), min(TRAINED_LENGTH, longest)
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
        (TrainedCase(f"masks of a trained gate, {trained} tokens", heads, trained, density=trained_density),
         Case(f"{trained} tokens", heads, trained, density=trained_density)),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainedCase(Case):
    """A call under the lists of the last heads of the bundled model's prefill gate, by top-k on held-out text.

    Random masks have neither sinks nor neighbours.
    """

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random queries, keys and values; lists of the gate."""
        return super().arguments(key) | {"blocks": _trained_lists(self.num_queries, self.heads.heads, self.density)}


@functools.cache
def _trained_lists(tokens: int, heads: int, density: float) -> BlockIndices:
    """Lists of the last of all layers' heads, one layer after the other; repeated where the model has fewer."""
    from seer_jax.evaluate import block_maps
    from seer_jax.models.pretrained import from_pretrained, load_tokenizer

    model = from_pretrained(tiny_lm.path(), [tiny_lm.gates()["prefill"]], dtype="float32")
    assert model.prefill_gate is not None
    text = (tiny_lm.path() / "eval_text.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(tiny_lm.path()).encode(text, special_tokens=False)[:tokens]
    kept = block_maps(model, jnp.asarray(ids), TopK(density, dense_last_rows=0)).kept
    kept = kept.reshape(-1, *kept.shape[2:])
    kept = jnp.tile(kept, (-(-heads // len(kept)), 1, 1))[-heads:]
    return BlockIndices.from_mask(kept[None], block_size=model.prefill_gate.config.block_size)


def variants(implementation: Implementation | None) -> Mapping[str, Any]:
    """The configurations by name that a backend offers as `CONFIGS`; none where it has no such choice."""
    if implementation is None:
        return {}
    return getattr(importlib.import_module(f"{PACKAGE}.{implementation}"), "CONFIGS", {})


@dataclasses.dataclass
class AttentionBench:
    """Measures cases. One object for a run: dense attention is timed once per shape, and no case twice.

    Attributes:
      implementation: see `block_sparse_attention`.
      variant: name and configuration, one of `variants`; None: the backend's own choice.
      seed: of the random inputs.
    """

    implementation: Implementation | None = None
    variant: tuple[str, Any] | None = None
    seed: int = 0
    _dense_times: DenseTimes = dataclasses.field(default_factory=DenseTimes)
    _done: dict[Case, Measurement] = dataclasses.field(default_factory=dict)

    def cases(self, cases: Sequence[Case]) -> Iterator[Measurement]:
        """One measurement per case."""
        for case in cases:
            yield self._measure(case, ATTENTION)

    def pairs(self, pairs: Sequence[tuple[Case, Case]]) -> Iterator[Measurement]:
        """One measurement per odd case; `share_of_aligned` is its rate over that of the aligned case."""
        for odd, aligned in pairs:
            other, found = (self._measure(case, ODD_CASES) for case in (aligned, odd))
            rate, aligned_rate = (m.results.get("effective_tflops") for m in (found, other))
            share = rate / aligned_rate if rate and aligned_rate else None
            results = {**found.results, "aligned_tflops": aligned_rate, "share_of_aligned": share}
            failure = found.failure or (other.failure and f"{aligned.name}: {other.failure}")
            yield dataclasses.replace(found, results=results, failure=failure)

    def _measure(self, case: Case, table: Table) -> Measurement:
        key = dataclasses.replace(case, name="")
        if key not in self._done:
            settings = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
            settings |= {"lists": case.lists or case.heads.heads, "num_keys": case.num_keys or case.num_queries}
            settings |= {"implementation": self.implementation, "config": self.variant and self.variant[0]}
            del settings["name"]
            # An implementation that is named must be able; one of its variants need not.
            required = self.implementation is not None and self.variant is None
            run = functools.partial(self._check_and_time, case)
            self._done[key] = measure(table.name, case.name, settings, run, required=required)
        return dataclasses.replace(self._done[key], table=table.name, case=case.name)

    def _check_and_time(self, case: Case) -> Outcome:
        key_case, key_rows = jax.random.split(jax.random.key(self.seed))
        arguments = case.arguments(key_case)
        arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
        attend_with_lse = compiled(self.implementation, self.variant and self.variant[1], case.density)
        attend = jax.jit(lambda arguments: attend_with_lse(**arguments)[0])  # what is timed: inference asks for no lse
        first, second = attend_with_lse(**arguments), (attend(arguments), attend_with_lse(**arguments)[1])
        call = AttentionCall(**arguments)
        checked = check_result(key_rows, call, *(AttentionWithScores(*x, None, None) for x in (first, second)))
        del first, second
        results = {"density": listed_share(call), **checked.results}
        if checked.failure is not None:
            return checked._replace(results=results)
        timing = time_calls(attend, arguments)
        dense = self._baseline(case, call)
        results |= timing.results | {"effective_tflops": listed_flops(call) / timing.milliseconds / 1e9}
        return Outcome(results | dense.results(timing.milliseconds), dense.note)

    def _baseline(self, case: Case, call: AttentionCall) -> Baseline:
        """Dense causal attention of the case's shape."""
        if case.query_offset or case.num_keys not in (None, case.num_queries):
            return Baseline(note="dense attention of JAX takes no query offset")
        return self._dense_times(call.q, call.k, call.v, None if case.lengths is None else call.lengths)


@functools.cache
def compiled(implementation: Implementation | None, config: Any | None, density: float) -> Callable[..., Any]:
    """The operation under `jax.jit`, giving (out, lse).

    Args:
      config: of the named backend, which is then called directly; None: the backend chooses.
      density: that is expected, a hint.
    """
    if config is None:
        attend = functools.partial(block_sparse_attention, return_lse=True, implementation=implementation)
        return jax.jit(functools.partial(attend, density=density))
    backend = importlib.import_module(f"{PACKAGE}.{implementation}").block_sparse_attention

    def run(q: Array, k: Array, v: Array, blocks: BlockIndices, query_offset: Array, lengths: Array) -> Any:
        offsets = jnp.broadcast_to(query_offset, lengths.shape).astype(jnp.int32)
        numbers = dict(scale=q.shape[-1] ** -0.5, query_offset=offsets, lengths=lengths, density=density)
        return backend(q, k, v, blocks, **numbers, config=config)

    return jax.jit(run)


def listed_flops(call: AttentionCall) -> float:
    """4 b^2 D for each block on the list of a query head, whole also where the mask cuts it; rows beyond a sequence have none."""
    blocks = call.blocks
    starts = _offsets(call) + np.arange(blocks.counts.shape[-1]) * blocks.block_size
    counts = np.where(starts < np.asarray(call.lengths)[:, None, None], blocks.counts, 0)
    listed = counts.sum(dtype=np.int64) * call.q.shape[2] // counts.shape[1]
    return 4.0 * blocks.block_size**2 * call.q.shape[-1] * float(listed)


def listed_share(call: AttentionCall) -> float:
    """Listed blocks over those that each row could list, mean over the lists."""
    b, counts = call.blocks.block_size, np.asarray(call.blocks.counts)
    ends = _offsets(call) + np.minimum((np.arange(counts.shape[-1]) + 1) * b, call.q.shape[1])
    in_sight = np.broadcast_to(-(-np.minimum(ends, call.k.shape[1]) // b), counts.shape)
    return float((counts.sum(-1, dtype=np.int64) / in_sight.sum(-1, dtype=np.int64)).mean())


def _offsets(call: AttentionCall) -> Int[np.ndarray, "B 1 1"]:
    """On the host, where a new shape compiles nothing."""
    return np.broadcast_to(call.query_offset, (len(call.q),))[:, None, None]

"""`block_sparse_attention` measured: each result is checked before it is timed, with dense attention beside it."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PRNGKeyArray

from pallas_kernels import AttentionWithScores, BlockIndices, block_sparse_attention
from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.block_sparse_attention.skipping import tile_queries
from seer_jax import tiny_lm
from seer_jax.bench.configs import PrefillBench
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.measurement import DenseTimes, Measurement, Outcome, dense_results, measure
from seer_jax.bench.harness.report import DENSE, DENSITY, ERRORS, MILLISECONDS, SPEEDUP, Column, Table
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.models.attention import by_block_row, kept_share
from seer_jax.selection.rules import TopK

OPERATION = Operation("block_sparse_attention", "pallas_kernels.block_sparse_attention")
RATE = Column("eff.\nTFLOP/s", "effective_tflops", ".3g", "4 b^2 D flop for each listed block of a head, over the time")
ALIGNED = (
    Column("aligned\nTFLOP/s", "aligned_tflops", ".3g", "rate of the aligned case beside it"),
    Column("of\naligned", "share_of_aligned", ".0%", "rate over that of the aligned case"),
)
CHECKED = (DENSITY, *ERRORS, MILLISECONDS, RATE)
ATTENTION = Table("attention", "Attention kernel", (*CHECKED, DENSE, SPEEDUP))
ODD_CASES = Table("cases", "Attention kernel, odd cases", (*CHECKED, *ALIGNED, DENSE, SPEEDUP))
ODD_LENGTH = 32768
TRAINED_LENGTH = 8192  # tokens that the bundled model was trained to read


def aligned_cases(config: PrefillBench) -> list[Case]:
    """Aligned prompts at each length and density: blocks of 64 and 128 tokens, lists per head and per key/value head; then the same
    with each threshold of skipping."""
    kinds = (("own", 64, None), ("own", 128, None), ("shared", 64, config.heads.kv_heads))
    return [
        Case(
            f"{n}, {b}x{b}, {kind}, {density:g}" + ("" if skip is None else f", skip {skip:g}"),
            config.heads,
            n,
            lists=lists,
            block_size=b,
            density=density,
            peak=config.peak,
            skip_threshold=skip,
        )
        for kind, b, lists in kinds
        for n in config.lengths
        for density in config.densities
        for skip in (None, *config.skip_thresholds)
    ]


def odd_cases(config: PrefillBench, density: float = 0.1) -> list[tuple[Case, Case]]:
    """Calls that are harder than aligned ones, each with the aligned call that it is compared with."""
    heads, length, trained = config.heads, *(min(n, max(config.lengths)) for n in (ODD_LENGTH, TRAINED_LENGTH))
    base = Case(f"{length} tokens", heads, length, density=density)
    quarter, eighth = length // 4, length // 8
    batch = dataclasses.replace(base, name=f"4 x {quarter} tokens", num_queries=quarter, batch=4)
    lengths = (quarter, quarter - quarter // 8 - 1, quarter // 2 + 1, min(64, quarter))
    change = functools.partial(dataclasses.replace, base)
    random = Case(f"{trained} tokens", heads, trained, density=config.model_density)
    return [
        (change(name=f"{length - 23} tokens", num_queries=length - 23), base),
        (dataclasses.replace(batch, name=f"4 rows of {', '.join(map(str, lengths))} tokens", lengths=lengths), batch),
        (change(name="head dim 64", heads=dataclasses.replace(heads, head_dim=64)), base),
        (change(name="as many key/value heads as heads", heads=dataclasses.replace(heads, kv_heads=heads.heads)), base),
        (change(name="float16", dtype="float16"), base),
        (change(name=f"the last {eighth} queries of {length}", num_queries=eighth, num_keys=length,
                query_offset=length - eighth), base),
        (TrainedCase(f"masks of a trained gate, {trained} tokens", heads, trained, density=random.density), random),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainedCase(Case):
    """A call under the lists of the bundled model's prefill gate on held-out text: random lists have neither sinks nor neighbours."""

    def arguments(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random queries, keys and values; lists of the gate."""
        return super().arguments(key) | {"blocks": _trained_lists(self.num_queries, self.heads.heads, self.density)}


@functools.cache
def _trained_lists(tokens: int, heads: int, density: float) -> BlockIndices:
    """By top-k, of the last of all layers' heads, one layer after the other; repeated where the model has fewer."""
    from seer_jax.models.hub import named_gates
    from seer_jax.models.pretrained import from_pretrained, load_tokenizer
    from seer_jax.plots import block_maps

    model = from_pretrained(tiny_lm.path(), [named_gates("tiny-lm-release")["prefill"]], dtype="float32")
    assert model.prefill_gate is not None
    text = tiny_lm.eval_text()
    ids = load_tokenizer(tiny_lm.path()).encode(text, special_tokens=False)[:tokens]
    kept = block_maps(model, jnp.asarray(ids), TopK(density, dense_last_rows=0)).kept
    kept = kept.reshape(-1, *kept.shape[2:])
    kept = jnp.tile(kept, (-(-heads // len(kept)), 1, 1))[-heads:]
    return BlockIndices.from_mask(kept[None], block_size=model.prefill_gate.config.block_size)


def variants(implementation: Implementation | None) -> dict[str, Any]:
    """The configurations by name that a backend offers as `CONFIGS`; none where it has no such choice."""
    if implementation is None:
        return {}
    return getattr(importlib.import_module(f"{OPERATION.package}.{implementation}"), "CONFIGS", {})


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
    _dense: DenseTimes = dataclasses.field(default_factory=DenseTimes)
    _done: dict[Case, Measurement] = dataclasses.field(default_factory=dict)

    def pair(self, odd: Case, aligned: Case) -> Measurement:
        """An odd case; `share_of_aligned` is its rate over that of the aligned case."""
        other, found = (self.measure(case, ODD_CASES) for case in (aligned, odd))
        rate, aligned_rate = (m.results.get("effective_tflops") for m in (found, other))
        share = rate / aligned_rate if rate and aligned_rate else None
        results = {**found.results, "aligned_tflops": aligned_rate, "share_of_aligned": share}
        failure = found.failure or (other.failure and f"{aligned.name}: {other.failure}")
        return dataclasses.replace(found, results=results, failure=failure)

    def measure(self, case: Case, table: Table = ATTENTION) -> Measurement:
        """One case."""
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
        call = AttentionCall(**arguments)
        skips = case.skip_threshold is not None
        with_lse = compiled(self.implementation, self.variant and self.variant[1], case.density, skips)
        attend = output_alone(with_lse)  # what is timed
        out, lse, kept = with_lse(**arguments)
        lse_again, kept_again = with_lse(**arguments)[1:]
        first = AttentionWithScores(out, lse, None, None)
        second = AttentionWithScores(attend(arguments), lse_again, None, None)
        outcome = check_result(key_rows, call, first, second, kept=(kept, kept_again) if skips else ())
        del out, lse, lse_again, first, second
        results = {"density": computed_share(call, kept) if skips else listed_share(call), **outcome.results}
        if outcome.failure is not None:
            return outcome._replace(results=results)
        timing = time_calls(attend, arguments)
        if case.query_offset or case.num_keys not in (None, case.num_queries):
            dense, note = None, "dense attention takes no query offset"
        else:
            dense, note = self._dense(call.q, call.k, call.v, None if case.lengths is None else call.lengths)
        results |= timing._asdict() | {"effective_tflops": listed_flops(call) / timing.milliseconds / 1e9}
        return Outcome({**results, **dense_results(dense, timing)}, note)


@functools.cache
def compiled(
    implementation: Implementation | None, config: Any | None, density: float, skips: bool
) -> Callable[..., Any]:
    """The operation under `jax.jit`, giving (out, lse, blocks that each tile of queries did not skip; None where none may be skipped).

    Args:
      config: of the named backend; None: the backend chooses.
      density: that is expected, a hint.
      skips: whether blocks may be skipped, by a `skip_threshold` among the arguments.
    """
    if config is None:
        attend = functools.partial(block_sparse_attention, density=density, implementation=implementation)
        if skips:
            return jax.jit(functools.partial(attend, return_lse=True, return_kept=True))
        return jax.jit(lambda **arguments: (*attend(**arguments, return_lse=True), None))

    def run(*, query_offset: Array, lengths: Array, **arrays: Any) -> Any:
        if skips:
            arrays["skip_threshold"] = jnp.broadcast_to(arrays["skip_threshold"], arrays["q"].shape[2])
        offsets = jnp.broadcast_to(query_offset, lengths.shape).astype(jnp.int32)
        rest = dict(scale=arrays["q"].shape[-1] ** -0.5, density=density, config=config)
        return OPERATION(implementation, **arrays, query_offset=offsets, lengths=lengths, **rest)

    return jax.jit(run)


@functools.cache
def output_alone(attend: Callable[..., Any]) -> Callable[[dict[str, Any]], Array]:
    """The first result of a function of named arguments."""
    return jax.jit(lambda arguments: attend(**arguments)[0])


def listed_flops(call: AttentionCall) -> float:
    """4 b^2 D for each block on the list of a query head, whole also where the mask cuts it; rows beyond a sequence have none."""
    blocks, b = call.blocks, call.blocks.block_size
    counts = np.where((call.positions[:, ::b] < call.lengths[:, None])[:, None], blocks.counts, 0)
    listed = counts.sum(dtype=np.int64) * call.q.shape[2] // counts.shape[1]
    return 4.0 * b**2 * call.q.shape[-1] * float(listed)


def listed_share(call: AttentionCall) -> float:
    """Listed blocks over those that each row could list, mean over the lists."""
    return float(call.blocks.density(_every_block(call).counts).mean())


def computed_share(call: AttentionCall, kept: Int32[Array, "B H tiles"]) -> float:
    """Blocks that were listed and not skipped over those that each tile of queries sees, mean over the sequences."""
    tile, rows = tile_queries(call.blocks.block_size), call.blocks.counts.shape[2]
    tiles = by_block_row((call.positions[:, ::tile] < call.lengths[:, None]).astype(jnp.int32), rows)
    visible = kept.shape[1] * tiles * _every_block(call).counts[:, 0]
    return float(kept_share(by_block_row(kept.sum(1), rows), visible).mean())


def _every_block(call: AttentionCall) -> BlockIndices:
    """Lists of every block that causality allows."""
    q, k, v, blocks, offset, lengths, _ = call
    return AttentionCall.dense(q, k, v, offset, lengths, block_size=blocks.block_size).blocks

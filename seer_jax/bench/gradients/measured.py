"""Gradients of `block_sparse_attention` measured: forward and backward together, checked before they are timed, beside dense attention's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import AttentionWithScores, block_sparse_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.block_sparse_attention.cases import Case
from pallas_kernels.cases import random_arrays
from seer_jax.bench.gradients.sampled_check import INPUTS, check_gradients
from seer_jax.bench.harness.clock import time_calls
from seer_jax.bench.harness.measurement import (
    DenseTime,
    Measurement,
    Outcome,
    Results,
    dense_results,
    measure,
    time_dense,
)
from seer_jax.bench.harness.report import DENSE, DENSITY, MILLISECONDS, SPEEDUP, Column, Table
from seer_jax.bench.harness.sampled_check import AttentionCall, check_result
from seer_jax.bench.prefill_attention import listed_flops, listed_share
from seer_jax.models.dense_attention import dense_attention

_PRODUCTS = 7 / 2  # 2 products of the forward and 5 of the backward, over those of the forward
GRADIENTS = Table(
    "gradients",
    "Attention kernel, forward and backward",
    (
        DENSITY,
        *(Column(f"d_{x}\nerror", f"{x}_error", ".1e", f"of the gradient of {x} on sampled blocks, relative") for x in INPUTS),
        Column("plain\nd error", "plain_error", ".1e", "the largest of these, of plain attention in the same number format"),
        MILLISECONDS,
        Column("forward\nms", "forward_milliseconds", ".4g", "of the forward alone"),
        Column("backward /\nforward", "backward_over_forward", ".2f", "the rest of the time over that of the forward"),
        Column("7 products\nTFLOP/s", "effective_tflops", ".3g", "14 b^2 D flop for each listed block of a head, over the time"),
        DENSE,
        SPEEDUP,
    ),
)  # fmt: skip


@dataclasses.dataclass
class GradientBench:
    """Measures cases; dense attention is timed once per shape.

    Attributes:
      implementation: see `block_sparse_attention`.
      seed: of the random inputs.
    """

    implementation: Implementation | None = None
    seed: int = 0
    _dense: dict[Any, DenseTime] = dataclasses.field(default_factory=dict)

    def measure(self, case: Case) -> Measurement:
        """One case, without `skip_threshold`, which has no gradients."""
        settings = dataclasses.asdict(case) | dataclasses.asdict(case.heads)
        settings |= {"lists": case.lists or case.heads.heads, "implementation": self.implementation, "config": None}
        del settings["name"]
        run = functools.partial(self._check_and_time, case)
        return measure(GRADIENTS.name, case.name, settings, run, required=self.implementation is not None)

    def _check_and_time(self, case: Case) -> Outcome:
        key_case, key_out, key_rows = jax.random.split(jax.random.key(self.seed), 3)
        arguments = case.arguments(key_case)
        arguments.setdefault("lengths", jnp.full(case.batch, arguments["k"].shape[1], jnp.int32))
        call = AttentionCall(**arguments)
        d_out = random_arrays(key_out, case.dtype, d_out=call.q.shape)["d_out"]
        forward, both = compiled(self.implementation, case.density)
        first, second = (AttentionWithScores(out, lse, None, None) for out, lse in map(forward, (arguments, arguments)))
        outcome = check_result(key_rows, call, first, second)
        if outcome.failure is None:
            gradients = both(arguments, d_out), both(arguments, d_out)
            outcome = check_gradients(key_rows, call, first, d_out, *gradients)
            del gradients
        results: Results = {"density": listed_share(call), **outcome.results}
        del first, second
        if outcome.failure is not None:
            return outcome._replace(results=results)
        timing, alone = time_calls(both, arguments, d_out), time_calls(lambda x: forward(x)[0], arguments)
        dense, note = self._time_dense(call, d_out)
        results |= timing._asdict() | dense_results(dense, timing)
        results["forward_milliseconds"] = alone.milliseconds
        results["backward_over_forward"] = timing.milliseconds / alone.milliseconds - 1
        results["effective_tflops"] = _PRODUCTS * listed_flops(call) / timing.milliseconds / 1e9
        return Outcome(results, note)

    def _time_dense(self, call: AttentionCall, d_out: Float[Array, "B T H D"]) -> DenseTime:
        key = call.q.shape, call.k.shape, call.q.dtype
        if key not in self._dense:
            pull_back = jax.jit(lambda q, k, v, d_out: jax.vjp(dense_attention, q, k, v)[1](d_out))
            self._dense[key] = time_dense(lambda: time_calls(pull_back, call.q, call.k, call.v, d_out))
        return self._dense[key]


@functools.cache
def compiled(implementation: Implementation | None, density: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(arguments -> (out, lse), (arguments, d_out) -> gradients in q, k and v), both under `jax.jit`; the latter runs the forward, too.

    Args:
      density: that is expected, a hint.
    """
    attend = functools.partial(block_sparse_attention, density=density, implementation=implementation)

    def both(arguments: dict[str, Any], d_out: Array) -> Any:
        def call(*qkv: Array) -> Any:
            changed: dict[str, Any] = arguments | dict(zip(INPUTS, qkv, strict=True))
            return attend(**changed)

        return jax.vjp(call, *(arguments[name] for name in INPUTS))[1](d_out)

    return jax.jit(lambda arguments: attend(**arguments, return_lse=True)), jax.jit(both)

"""What sparse attention is compared with: JAX's fastest dense attention, cuDNN's on a GPU and XLA's elsewhere."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from seer_jax.bench.harness.clock import Timing, time_calls
from seer_jax.bench.harness.measurement import first_line
from seer_jax.bench.harness.memory import default_device


class Baseline(NamedTuple):
    """Time of what a measurement is compared with, or a note why there is none."""

    milliseconds: float | None = None
    note: str | None = None

    @classmethod
    def of_dense(cls, take: Callable[[], Timing]) -> "Baseline":
        """The time that `take` measures of dense attention; none where this device cannot run it."""
        try:
            return cls(take().milliseconds)
        except (ValueError, RuntimeError) as error:  # NotImplementedError among them, and errors of the device
            return cls(note=f"dense attention: {first_line(error)}")

    def over(self, milliseconds: float | None) -> float | None:
        """How many times faster than the baseline a time is."""
        return self.milliseconds / milliseconds if self.milliseconds and milliseconds else None

    def results(self, milliseconds: float) -> dict[str, float | None]:
        """The dense time and the speedup over it, as a measurement holds them."""
        return {"dense_milliseconds": self.milliseconds, "speedup": self.over(milliseconds)}


class DenseTimes:
    """Times of dense causal attention, taken once per shape."""

    def __init__(self) -> None:
        self._known: dict[tuple, Baseline] = {}

    def __call__(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        lengths: Int[Array, "B"] | None = None,
    ) -> Baseline:
        """The time for arrays of these shapes, dtypes and lengths."""
        shape = (q.shape, k.shape, q.dtype, None if lengths is None else tuple(lengths.tolist()))
        if shape not in self._known:
            attend = dense_attention(causal=True)
            self._known[shape] = Baseline.of_dense(lambda: time_calls(attend, q, k, v, lengths))
        return self._known[shape]


def dense_attention(*, causal: bool) -> Callable[..., Any]:
    """Compiled dense attention, (q, k, v, lengths) -> output.

    Args:
      causal: queries are the tokens of the keys, each of which sees those before it; otherwise each query sees every key.
    """
    fastest = "cudnn" if default_device().platform == "gpu" else "xla"
    return functools.partial(_attend, causal=causal, implementation=fastest)


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def _attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    lengths: Int[Array, "B"] | None,
    *,
    causal: bool,
    implementation: Any,
) -> Float[Array, "B T H D"]:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=lengths if causal else None,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )

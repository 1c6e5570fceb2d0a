"""Comparison of a converted model's logits with a reference."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.passes import read_layers
from seer_jax.models.decoder.stack import Segment
from seer_jax.sharding.on_mesh import OF_VOCABULARY, Split


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds on the deviation of a model that computes the same function.

    Attributes:
      relative_error: of the logits, ||ours - reference|| / ||reference||. float32 models reach 1e-5; bfloat16 ones about 1e-2.
      kl: largest KL(reference || ours) at any position, nats.
    """

    relative_error: float = 1e-4
    kl: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.relative_error > 0 and self.kl > 0):
            raise ValueError(f"Bounds must be positive; got relative_error={self.relative_error}, kl={self.kl}.")


@dataclasses.dataclass(frozen=True)
class LogitsReport:
    """Deviation of logits from a reference.

    Attributes:
      positions: number of positions compared.
      max_abs_error: largest absolute difference of a logit.
      relative_error: ||ours - reference|| / ||reference||.
      kl_mean, kl_max: KL(reference || ours) over positions, nats.
      same_argmax: share of positions whose likeliest token is the same.
      bounds: of a pass.
    """

    positions: int
    max_abs_error: float
    relative_error: float
    kl_mean: float
    kl_max: float
    same_argmax: float
    bounds: Bounds

    @property
    def passed(self) -> bool:
        # In this form NaN fails.
        return self.relative_error <= self.bounds.relative_error and self.kl_max <= self.bounds.kl

    def __str__(self) -> str:
        return (
            f"{'PASS' if self.passed else 'FAIL'} at {self.positions} positions: relative error {self.relative_error:.2e} "
            f"(bound {self.bounds.relative_error:.0e}), KL max {self.kl_max:.2e} (bound {self.bounds.kl:.0e}), "
            f"KL mean {self.kl_mean:.2e}, max abs error {self.max_abs_error:.2e}, same argmax {self.same_argmax:.1%}"
        )


def compare_logits(ours: np.ndarray, reference: np.ndarray, bounds: Bounds = Bounds()) -> LogitsReport:
    """Compares logits `[..., V]` in float64.

    Raises:
      ValueError: the shapes differ.
    """
    if ours.shape != reference.shape:
        raise ValueError(f"Logits must have the shape of the reference, {reference.shape}; got {ours.shape}.")
    a, b = (np.asarray(x, np.float64).reshape(-1, ours.shape[-1]) for x in (ours, reference))
    with np.errstate(invalid="ignore"):  # NaN is reported
        log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    kl = np.sum(np.exp(log_b) * (log_b - log_a), axis=-1)
    return LogitsReport(
        positions=len(a),
        max_abs_error=float(np.abs(a - b).max()),
        relative_error=float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        same_argmax=float((a.argmax(-1) == b.argmax(-1)).mean()),
        bounds=bounds,
    )


def verify_logits(model: Transformer, path: str | os.PathLike[str], bounds: Bounds = Bounds()) -> LogitsReport:
    """Runs the dense model on the reference's tokens and compares logits.

    Args:
      model: float32 for exact comparison.
      path: safetensors file with `input_ids` `[B, T]` (or `[T]`), `logits` `[B, N, V]` (or `[N, V]` for one row) and, where
        not all T positions are given, `positions` `[N]`.
      bounds: of a pass.

    Raises:
      ValueError: the file lacks a tensor, or its shapes do not fit one another or the model.
    """
    ids, positions, logits = _reference(Path(path))
    if logits.shape[-1] != model.config.vocab_size:
        raise ValueError(
            f"{path}: logits must be over the model's {model.config.vocab_size} tokens; got {logits.shape[-1]}. Give the "
            "reference of this model."
        )
    model.check(jnp.asarray(ids), None)
    # TF32 products, the default on GPUs, have errors of 1e-3.
    with jax.default_matmul_precision("highest"):
        ours = _logits_at(model, jnp.asarray(ids), jnp.asarray(positions))
    return compare_logits(np.asarray(ours), logits, bounds)


@jax.jit
def _logits_at(model: Transformer, ids: jax.Array, positions: jax.Array) -> jax.Array:
    segments = [Segment(model.config.num_layers)]
    return model.everywhere(model.spread(_read_logits, (OF_VOCABULARY,), segments, ids, Split(positions, P()))[0])


def _read_logits(
    model: Transformer, segments: Sequence[Segment], ids: jax.Array, positions: jax.Array
) -> tuple[jax.Array]:
    hidden, _ = read_layers(model, segments, ids, jnp.full(len(ids), ids.shape[1], jnp.int32))
    return (model.logits(hidden[:, positions]),)


def _reference(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise FileNotFoundError(f"The reference must be a file; {str(path)!r} is none. Check the path.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: a reference must be a safetensors file; got {error}.") from error
    missing = [name for name in ("input_ids", "logits") if name not in tensors]
    if missing:
        raise ValueError(
            f"{path}: a reference must have input_ids and logits, and may have positions; missing {missing}."
        )
    ids = np.atleast_2d(tensors["input_ids"]).astype(np.int32)
    logits = tensors["logits"] if tensors["logits"].ndim == 3 else tensors["logits"][None]
    positions = (tensors["positions"] if "positions" in tensors else np.arange(ids.shape[1])).astype(np.int32)
    if logits.shape[:2] != (len(ids), len(positions)) or positions.min() < 0 or positions.max() >= ids.shape[1]:
        raise ValueError(
            f"{path}: logits must be [B, N, V] for N positions within the T tokens of input_ids [B, T]; got logits "
            f"{logits.shape}, input_ids {ids.shape}, positions {positions.min()} .. {positions.max()} ({len(positions)})."
        )
    return ids, positions, logits

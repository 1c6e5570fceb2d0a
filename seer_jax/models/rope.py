"""Rotary position embedding with the scalings that Llama 3.x and Qwen use (half-split convention, `rotate_half`)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seer_jax.models.config import RopeConfig, RopeKind


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Angle per token of each of the dim/2 channel pairs, float32 `[dim / 2]`.

    default: theta^(-2i/dim). linear: that over `factor`. llama3: low frequencies over `factor`, high ones kept, a linear ramp
    between. yarn: the same with a ramp over channel indices (arXiv 2309.00071, sec. 3.2).
    """
    plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind is RopeKind.LINEAR:
        plain = plain / rope.factor
    elif rope.kind is RopeKind.LLAMA3:
        rotations = rope.original_max_position * plain / (2 * math.pi)
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        plain = _mix(plain / rope.factor, plain, np.clip(keep, 0, 1))
    elif rope.kind is RopeKind.YARN:
        low, high = (_channel_of(rope, dim, r) for r in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2) - low) / max(high - low, 1e-3)
        plain = _mix(plain, plain / rope.factor, np.clip(ramp, 0, 1))
    return plain.astype(np.float32)


def same_rope(a: RopeConfig, b: RopeConfig, dim: int) -> bool:
    """Whether both rotate alike, however they are written."""
    frequencies = (inverse_frequencies(rope, dim) for rope in (a, b))
    return math.isclose(a.attention_factor, b.attention_factor, rel_tol=1e-6) and np.allclose(
        *frequencies, rtol=1e-6, atol=0
    )


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a * (1 - share) + b * share


def _channel_of(rope: RopeConfig, dim: int, rotations: float) -> float:
    """Channel pair that turns `rotations` times within the original context."""
    return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def apply_rope(
    x: Float[Array, "*b T heads dim"], positions: Int[Array, "*#b T"], rope: RopeConfig
) -> Float[Array, "*b T heads dim"]:
    """Rotates each channel pair (i, i + dim/2) by position times its frequency.

    Args:
      x: queries or keys, any float dtype; the rotation is computed in float32 and rounded back.
      positions: of the tokens, broadcast against x without its last two axes.
      rope: frequencies and scaling.
    """
    angles = jnp.einsum("...t,d->...td", positions.astype(jnp.float32), inverse_frequencies(rope, x.shape[-1]))
    cos = jnp.cos(angles)[..., None, :] * rope.attention_factor
    sin = jnp.sin(angles)[..., None, :] * rope.attention_factor
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], positions: Int[Array, "#B T"], rope: RopeConfig
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
    """RoPE on queries and keys of the same tokens."""
    return apply_rope(q, positions, rope), apply_rope(k, positions, rope)

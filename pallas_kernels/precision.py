"""Products of float32 arrays that stay float32 products on accelerators, which round to half of that when left alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

TENSOR_CORE_ROWS = 2048


def precise_einsum(equation: str, x: Float32[Array, "..."], y: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """An einsum of two arrays that errs by about 2e-7 relative to the norms of the vectors it multiplies.

    Tensor cores take three passes over TF32 parts for that, and are faster where x holds many vectors.
    """
    many = x.size // x.shape[-1] >= TENSOR_CORE_ROWS
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if many and _has_tf32() else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _has_tf32() -> bool:
    """NVIDIA GPUs have it from Ampere on."""
    capability = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
    return capability.replace(".", "").isdigit() and float(capability) >= 8

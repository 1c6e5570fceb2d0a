"""Linear maps of pooled vectors that both gates make, and where their training starts."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import precise_einsum
from seer_jax.draws import standard_normal
from seer_jax.gates.configs import Pool

FEW_VECTORS = 16  # above this number, a sum of products would read the weights too often


@functools.partial(jax.jit, static_argnames=("shape", "kinds", "head_dim"))
def initial_projection(key: jax.Array, shape: tuple[int, ...], kinds: tuple[Pool, ...], head_dim: int) -> jax.Array:
    """Starts a projection `[..., P, C]` as the identity on the average pool where the shapes allow it.

    The untrained gate then scores blocks by their mean query against their mean key, which is already a fair guess; random
    projections would have to find it first. Where one of C and D divides the other, RoPE turns every D/C-th pair of channels (every
    C/D-th of the gate's) by the same angles: these pairs are kept as they are. Otherwise random matrices that preserve lengths on average.
    """
    rows, dim = shape[-2:]
    noise = standard_normal(key, shape)
    if (dim % head_dim and head_dim % dim) or Pool.AVG not in kinds:
        return noise * rows**-0.5
    start = kinds.index(Pool.AVG) * head_dim
    pairs = jnp.arange(min(dim, head_dim) // 2)
    source, target = (
        jnp.concatenate([pairs * (d // 2 // len(pairs)) + half * (d // 2) for half in (0, 1)]) for d in (head_dim, dim)
    )
    identity = jnp.zeros((rows, dim), jnp.float32).at[start + source, target].set(1)
    return jnp.broadcast_to(identity, shape) + 0.02 * rows**-0.5 * noise


def project(x: Float[Array, "B n heads P"], weight: Float[Array, "heads P C"]) -> Float[Array, "B n heads C"]:
    """A projection of each head by its own matrix."""
    return precise_einsum("bnkp,kpc->bnkc", x, weight)


def project_few(x: Float[Array, "B n heads P"], weight: Float[Array, "heads P C"]) -> Float[Array, "B n heads C"]:
    """As `project`, but of few vectors a sum of products.

    While single tokens are decoded, XLA fuses a sum with its neighbours; a matrix product needs copies of its operands in every
    layer. (On GPUs XLA keeps one transposed copy of the stacked weights for it.)
    """
    if x.shape[0] * x.shape[1] > FEW_VECTORS:
        return project(x, weight)
    return (x[..., None] * weight[None, None]).sum(-2)

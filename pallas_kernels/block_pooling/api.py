"""`pool_blocks`: one vector per block of tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.checks import BLOCK_SIZES, check_arrays, check_size

KINDS = ("max", "min", "avg")
SIZES = (1, 2, 4, 8, *BLOCK_SIZES)  # smaller ones for gates with several vectors per block

_run = Operation("pool_blocks", "pallas_kernels.block_pooling", gradients="pool_blocks_gradients")


def pool_blocks(
    x: Float[Array, "B T heads D"],
    kinds: tuple[str, ...],
    *,
    block_size: int,
    valid: Bool[Array, "#B T"] | None = None,
    implementation: Implementation | None = None,
) -> Float32[Array, "B Tb heads P"]:
    """Pools each block of tokens, channel by channel: maximum, minimum or mean over its valid tokens.

    Differentiable. Results do not depend on the values of invalid tokens, which may be NaN.

    Args:
      x: queries or keys before RoPE: float32, bfloat16 or float16. The last block may have fewer than b tokens.
      kinds: "max", "min", "avg"; the pooled vectors are concatenated in this order.
      block_size: tokens per pool, a power of two from 1 to 128: b, or less where a block is to have several vectors.
      valid: which tokens are pooled; None: all. A block without any gives zeros.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; block_size from 8; heads * D a multiple of 256), or None for the fastest that
        takes these arguments on their device.

    Returns:
      float32, P = len(kinds) * D.

    Raises:
      ValueError: unknown kinds, or shapes and dtypes that do not match.
      NotImplementedError: the named implementation cannot do this.

    Source: SeerAttention, arXiv 2410.13276, sec. 3.1.

    >>> x = jnp.arange(40.0).reshape(1, 20, 1, 2)
    >>> pool_blocks(x, ("min", "avg"), block_size=16)[0, :, 0].tolist()
    [[0.0, 1.0, 15.0, 16.0], [32.0, 33.0, 35.0, 36.0]]
    """
    name = "pool_blocks"
    check_size(name, block_size, SIZES)
    check_arrays(name, x=x, valid=valid)
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"{name}: kinds must be a tuple of some of {KINDS}; got {kinds!r}.")
    if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x must be floats [B, T, heads, D], no axis empty; got {x.dtype} {x.shape}.")
    shapes = (x.shape[:2], (1, x.shape[1]))
    if valid is not None and (valid.dtype != jnp.bool_ or valid.shape not in shapes):
        raise ValueError(f"{name}: valid must be bool, one of {shapes}; got {valid.dtype} {valid.shape}.")
    return _run(implementation, x, kinds=tuple(str(kind) for kind in kinds), block_size=block_size, valid=valid)

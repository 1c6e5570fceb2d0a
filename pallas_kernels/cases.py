"""Parts of the operations' named cases: head shapes of real models, random arrays, random block lists."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas_kernels.blocks import BlockIndices

ELEMENTS_AT_ONCE = 2**21  # drawn at a time for a large array, so that little memory is needed beside it


@dataclasses.dataclass(frozen=True)
class Heads:
    """H query heads, K key/value heads, D head dim."""

    heads: int
    kv_heads: int
    head_dim: int


LLAMA_3_1_8B = Heads(32, 8, 128)
QWEN2_5_7B = Heads(28, 4, 128)
QWEN3_4B = Heads(32, 8, 128)


def random_arrays(key: PRNGKeyArray, dtype: str, **shapes: tuple[int, ...]) -> dict[str, Array]:
    """Standard normal arrays with these names and shapes."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = jax.random.normal(key, (sum(sizes),), dtype)  # one draw compiles faster than several
    parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def large_random_array(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, scale: float = 1.0
) -> Float[Array, "..."]:
    """Normal array with mean 0 and standard deviation `scale`, drawn a few rows at a time in little additional memory.

    Args:
      key: of implementation "rbg", which is fast.
    """
    rows = math.prod(shape[:-1])
    most = max(1, ELEMENTS_AT_ONCE // shape[-1])
    parts = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)

    def part(key: PRNGKeyArray) -> Float[Array, "rows last"]:
        return jax.random.normal(key, (rows // parts, shape[-1]), dtype) * scale

    return jax.lax.map(part, jax.random.split(key, parts)).reshape(shape)


def random_blocks(
    key: PRNGKeyArray,
    last: Int[Array, "*lists R"],
    num_key_blocks: int,
    *,
    block_size: int,
    density: float | Float[Array, ""],
) -> BlockIndices:
    """Lists that contain each row's last block and, with probability `density` each, the blocks before it.

    Args:
      last: last block that each row sees, in prefill the diagonal one; negative for an empty list.
      num_key_blocks: Sb.
      block_size: b.
      density: from 0 to 1.
    """
    shape = (*last.shape, num_key_blocks)
    block, last = jax.lax.broadcasted_iota(jnp.int32, shape, last.ndim), last[..., None]
    kept = (block == last) | (jax.random.bernoulli(key, density, shape) & (block < last))
    return BlockIndices.from_mask(kept, block_size=block_size)

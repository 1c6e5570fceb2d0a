"""`pool_blocks` for Hopper GPUs, in Pallas Mosaic GPU: reads each token once and pools in registers.

A CTA takes some heads of one block of tokens, each of its threads 2 to 8 adjacent channels, so that a thread loads up to 16 bytes at a
time. The tokens of a block are then in the registers of one thread, so that pooling needs no communication between threads. Blocks whose
tokens are all valid, which most are, take a path without masks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.backends import Unsupported
from pallas_kernels.devices import interpreter

CHANNELS = 256  # of all heads together: a multiple of this
SMALLEST = 8  # tokens of a block
WARPS, LANES = 4, 32
_LOAD = 16  # bytes that a thread loads at a time
_HELD = 128  # bytes of a block that a thread holds, half of it for several kinds, unless two channels are more
_f32, _i32 = jnp.float32, jnp.int32


def pool_blocks(
    x: Float[Array, "B T heads D"], *, kinds: tuple[str, ...], block_size: int, valid: Bool[Array, "#B T"] | None
) -> Float32[Array, "B Tb heads P"]:
    """See the function of this name in api.py."""
    _, tokens, heads, dim = x.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes float32, bfloat16 and float16; got {x.dtype}.")
    if heads * dim % CHANNELS:
        raise Unsupported(f"takes a multiple of {CHANNELS} channels in all heads together; got {heads} * {dim}.")
    if block_size < SMALLEST:
        raise Unsupported(f"takes blocks of at least {SMALLEST} tokens; got {block_size}.")
    if tokens < block_size:
        raise Unsupported(f"takes at least one whole block of {block_size} tokens; got {tokens}.")
    return _pool(kinds, block_size, interpreter(), x, valid)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that a kernel is compiled for.

    Attributes:
      kinds, block_size, tokens: see `pool_blocks`, b, T.
      heads, dim: of x as the kernel sees it.
      vector: adjacent channels of a thread.
      shared_valid: whether all sequences share `valid`.
    """

    kinds: tuple[str, ...]
    block_size: int
    tokens: int
    heads: int
    dim: int
    vector: int
    shared_valid: bool

    @property
    def blocks(self) -> int:
        """Tb."""
        return -(-self.tokens // self.block_size)

    @property
    def tile_heads(self) -> int:
        """Heads of a CTA."""
        return WARPS * LANES * self.vector // self.dim

    @property
    def parts(self) -> int:
        """CTAs of a block."""
        return self.heads // self.tile_heads

    @property
    def layout(self) -> Any:
        """Layout of a tile [b, heads, D], of which each warp has some heads or a part of one."""
        per_warp = LANES * self.vector
        of_warp = max(1, per_warp // self.dim), min(self.dim, per_warp)
        tiling = plgpu.Tiling(((1, self.tile_heads, self.dim), of_warp, (1, self.vector)))
        x = mgpu.TiledLayout(tiling, (-6, -5), (-4, -3), -1, _check_canonical=False).canonicalize()
        return plgpu.Layout.TILED(x.tiling, x.warp_dims, x.lane_dims, x.vector_dim)

    def work_of(self, cta: Array) -> tuple[Array, Array, Array]:
        """(sequence, block, first head) of a CTA."""
        part, cta = lax.rem(cta, _i32(self.parts)), lax.div(cta, _i32(self.parts))
        return lax.div(cta, _i32(self.blocks)), lax.rem(cta, _i32(self.blocks)), part * self.tile_heads


def _vector(channels: int, kinds: int, block_size: int, itemsize: int) -> int:
    """Adjacent channels of a thread. Several kinds take more registers, of which more would leave too few CTAs to wait for memory."""
    held = _HELD if kinds == 1 else _HELD // 2
    most = max(2, min(_LOAD, held // block_size) // itemsize)
    return next(n for n in (8, 4, 2) if n <= most and channels % (WARPS * LANES * n) == 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pool(
    kinds: tuple[str, ...],
    block_size: int,
    interpret: Any,
    x: Float[Array, "B T heads D"],
    valid: Bool[Array, "#B T"] | None,
) -> Float32[Array, "B Tb heads P"]:
    batch, tokens, heads, dim = x.shape
    vector = _vector(heads * dim, len(kinds), block_size, x.dtype.itemsize)
    # Channels in which no whole heads fit a CTA are taken as heads of another size, and the result is transposed.
    unit = CHANNELS if WARPS * LANES * vector % dim else dim
    shared = valid is not None and valid.shape[0] == 1
    if valid is None and tokens % block_size:
        valid, shared = jnp.ones((1, tokens), bool), True
    call = _Call(kinds, block_size, tokens, heads * dim // unit, unit, vector, shared)
    operands = [x.reshape(batch, tokens, -1, unit)]
    if valid is not None:
        padded = jnp.pad(valid, ((0, 0), (0, call.blocks * block_size - tokens)))
        operands += [valid.astype(jnp.int8), padded.reshape(-1, call.blocks, block_size).sum(-1, dtype=_i32)]
    pooled = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=jax.ShapeDtypeStruct((batch, call.blocks, call.heads, len(kinds), unit), _f32),
        grid=(batch * call.blocks * call.parts,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
    )(*operands)
    if unit != dim:
        pooled = pooled.swapaxes(2, 3).reshape(batch, call.blocks, len(kinds), heads, dim).swapaxes(2, 3)
    return pooled.reshape(batch, call.blocks, heads, -1)


def _kernel(call: _Call, x_ref, *refs) -> None:
    """Pools x [B, T, heads, D], optionally with valid [B or 1, T] and its count per block, to [B, Tb, heads, kinds, D]."""
    *valid_refs, pooled_ref = refs
    sequence, block, head = call.work_of(lax.axis_index("cta"))
    heads = pl.ds(head, call.tile_heads)
    # A partial block is loaded with tokens before its first one, which are masked.
    start = jnp.minimum(block * call.block_size, call.tokens - call.block_size)
    tokens = pl.ds(start, call.block_size)
    x = plgpu.load(x_ref.at[sequence, tokens, heads], layout=call.layout, optimized=False)

    def whole() -> list[Array]:
        return [_pool_tile(kind, x) for kind in call.kinds]

    def some() -> list[Array]:
        of_tokens = call.layout.reduce((1, 2))
        valid = plgpu.load(valid_ref.at[row, tokens], layout=of_tokens, optimized=False).astype(_i32)
        token = plgpu.broadcasted_iota(_i32, valid.shape, 0, layout=of_tokens) + start
        valid = jnp.where(token >= block * call.block_size, valid, 0)
        return [_pool_masked_tile(kind, x, valid, count) for kind in call.kinds]

    if valid_refs:
        valid_ref, count_ref = valid_refs
        row = 0 if call.shared_valid else sequence
        count = count_ref[row, block]
        results = lax.cond(count == call.block_size, whole, some)
    else:
        results = whole()
    for kind, result in enumerate(results):
        pooled_ref[sequence, block, heads, kind] = result


def _pool_tile(kind: str, x: Float[Array, "b heads D"]) -> Float32[Array, "heads D"]:
    match kind:
        case "max":
            return x.max(axis=0).astype(_f32)
        case "min":
            return x.min(axis=0).astype(_f32)
    return x.astype(_f32).sum(axis=0) * (1 / x.shape[0])


def _pool_masked_tile(kind: str, x: Float[Array, "b heads D"], valid: Array, count: Array) -> Float32[Array, "heads D"]:
    """Pools the tokens of which `valid` [b] is not 0, `count` in all."""
    taken = lax.broadcast_in_dim(valid, x.shape, [0]) != 0
    some = jnp.broadcast_to(count, x.shape[1:]) > 0

    def pool(fill: float, reduce: Any) -> Array:
        return jnp.where(some, reduce(jnp.where(taken, x.astype(_f32), fill)), 0.0)

    match kind:
        case "max":
            return pool(-jnp.inf, lambda x: x.max(axis=0))
        case "min":
            return pool(jnp.inf, lambda x: x.min(axis=0))
    return pool(0.0, lambda x: x.sum(axis=0)) / jnp.maximum(count, 1).astype(_f32)

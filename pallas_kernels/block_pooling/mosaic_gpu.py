"""`pool_blocks` for Hopper GPUs, in Pallas Mosaic GPU: reads each token once and pools in registers.

A CTA takes 256 channels of one block of tokens, each warp 64 of them, each lane two. The tokens of a block are then in the registers
of one thread, so that pooling needs no communication between threads. Blocks whose tokens are all valid, which most are, take a path
without masks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.backends import Unsupported
from pallas_kernels.checks import BLOCK_SIZES
from pallas_kernels.devices import interpreter

CHANNELS = 256  # channels of a CTA

_TILE = plgpu.Layout.TILED(plgpu.Tiling(((1, CHANNELS), (64,), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

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
    if block_size < BLOCK_SIZES[0]:
        raise Unsupported(f"takes blocks of at least {BLOCK_SIZES[0]} tokens; got {block_size}.")
    if tokens < block_size:
        raise Unsupported(f"takes at least one whole block of {block_size} tokens; got {tokens}.")
    return _pool(kinds, block_size, interpreter(), x, valid)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Parameters that a kernel is compiled for: kinds, b, T, Tb, CTAs per block, and whether all sequences share `valid`."""

    kinds: tuple[str, ...]
    block_size: int
    tokens: int
    blocks: int
    parts: int
    shared_valid: bool

    def work_of(self, cta: Array) -> tuple[Array, Array, Array]:
        """(sequence, block, first channel) of a CTA."""
        part, cta = lax.rem(cta, _i32(self.parts)), lax.div(cta, _i32(self.parts))
        return lax.div(cta, _i32(self.blocks)), lax.rem(cta, _i32(self.blocks)), part * CHANNELS


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pool(
    kinds: tuple[str, ...],
    block_size: int,
    interpret: Any,
    x: Float[Array, "B T heads D"],
    valid: Bool[Array, "#B T"] | None,
) -> Float32[Array, "B Tb heads P"]:
    batch, tokens, heads, dim = x.shape
    blocks = -(-tokens // block_size)
    if valid is None and tokens % block_size:
        valid = jnp.ones((1, tokens), bool)
    operands = [x.reshape(batch, tokens, heads * dim)]
    if valid is not None:
        padded = jnp.pad(valid, ((0, 0), (0, blocks * block_size - tokens)))
        operands += [valid.astype(jnp.int8), padded.reshape(-1, blocks, block_size).sum(-1, dtype=_i32)]
    shared = valid is not None and valid.shape[0] == 1
    call = _Call(kinds, block_size, tokens, blocks, heads * dim // CHANNELS, shared)
    pooled = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=[jax.ShapeDtypeStruct((batch, blocks, heads * dim), _f32)] * len(kinds),
        grid=(batch * blocks * call.parts,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
    )(*operands)
    return jnp.concatenate([x.reshape(batch, blocks, heads, dim) for x in pooled], axis=-1)


def _kernel(call: _Call, x_ref, *refs) -> None:
    """Pools x [B, T, heads * D], optionally with valid [B or 1, T] and its count per block, to [B, Tb, heads * D] per kind."""
    valid_refs, pooled_refs = refs[: -len(call.kinds)], refs[-len(call.kinds) :]
    sequence, block, channel = call.work_of(lax.axis_index("cta"))
    channels = pl.ds(channel, CHANNELS)
    # A partial block is loaded with tokens before its first one, which are masked.
    start = jnp.minimum(block * call.block_size, call.tokens - call.block_size)
    tokens = pl.ds(start, call.block_size)
    x = plgpu.load(x_ref.at[sequence, tokens, channels], layout=_TILE, optimized=False)

    def whole() -> list[Array]:
        return [_pool_tile(kind, x) for kind in call.kinds]

    def some() -> list[Array]:
        valid = plgpu.load(valid_ref.at[row, tokens], layout=_TILE.reduce(1), optimized=False).astype(_i32)
        token = plgpu.broadcasted_iota(_i32, valid.shape, 0, layout=_TILE.reduce(1)) + start
        valid = jnp.where(token >= block * call.block_size, valid, 0)
        return [_pool_masked_tile(kind, x, valid, count) for kind in call.kinds]

    if valid_refs:
        valid_ref, count_ref = valid_refs
        row = 0 if call.shared_valid else sequence
        count = count_ref[row, block]
        results = lax.cond(count == call.block_size, whole, some)
    else:
        results = whole()
    for ref, result in zip(pooled_refs, results, strict=True):
        ref[sequence, block, channels] = result


def _pool_tile(kind: str, x: Float[Array, "b C"]) -> Float32[Array, "C"]:
    match kind:
        case "max":
            return x.max(axis=0).astype(_f32)
        case "min":
            return x.min(axis=0).astype(_f32)
    return x.astype(_f32).sum(axis=0) * (1 / x.shape[0])


def _pool_masked_tile(kind: str, x: Float[Array, "b C"], valid: Array, count: Array) -> Float32[Array, "C"]:
    """Pools the tokens of which `valid` [b] is not 0, `count` in all."""
    taken = jnp.broadcast_to(valid[:, None], x.shape) != 0
    some = jnp.broadcast_to(count, x.shape[1:]) > 0

    def pool(fill: float, reduce: Any) -> Array:
        return jnp.where(some, reduce(jnp.where(taken, x.astype(_f32), fill)), 0.0)

    match kind:
        case "max":
            return pool(-jnp.inf, lambda x: x.max(axis=0))
        case "min":
            return pool(jnp.inf, lambda x: x.min(axis=0))
    return pool(0.0, lambda x: x.sum(axis=0)) / jnp.maximum(count, 1).astype(_f32)

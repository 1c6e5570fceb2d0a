"""`score_sub_blocks` for Hopper GPUs, in Pallas Mosaic GPU: this prepares the arrays of `kernel.py`. README.md beside this explains it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int32

from pallas_kernels.backends import Unsupported
from pallas_kernels.devices import interpreter
from pallas_kernels.mosaic.flash_tiles import LOG2_E, positive_scale
from pallas_kernels.sub_block_scores.decode import score_for_one_query
from pallas_kernels.sub_block_scores.kernel import ROWS, Call, Tuning, sub_block_kernel
from pallas_kernels.sub_block_scores.xla import FEW, own_rows

_LARGEST = 14  # exponent of the largest element of a list after scaling: float16 reaches 2^16
_MAX_EXPONENT = 126
_f32, _i32 = jnp.float32, jnp.int32


def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "P Sw K C"],
    *,
    seen: Int32[Array, "#B Tu 2"],
    queries_per_row: int,
    keys_per_block: int,
    join: str,
    heads: str,
    scale: float,
    first_row: Int32[Array, ""] | None = None,
    tuning: Tuning | None = None,
) -> Float32[Array, "B lists rows Sb"]:
    """See the function of this name in api.py.

    Args:
      tuning: how the kernel uses a multiprocessor; None for the choice of `Tuning.of`.
    """
    (_, vectors, num_heads, dim), kv_heads = queries.shape, keys.shape[2]
    if dim not in (64, 128):
        raise Unsupported(f"takes vectors of 64 and 128 elements; got {dim}.")
    if vectors == 1:
        return score_for_one_query((keys_per_block, join, heads, scale), interpreter(), queries, keys, seen, first_row)
    if vectors * num_heads // kv_heads <= FEW:
        got = f"{vectors} of {num_heads // kv_heads} heads"
        raise Unsupported(f"takes more than {FEW} query vectors per key head, or one for all heads; got {got}.")
    if keys_per_block not in (1, 2, 4, 8, 16):
        raise Unsupported(f"takes 1, 2, 4, 8 or 16 key vectors per block; got {keys_per_block}.")
    group = 1 if heads == "each" else num_heads // kv_heads
    rows = -(-vectors // queries_per_row)
    ctas = len(queries) * (num_heads // group) * -(-rows // ROWS)
    tuning = tuning or Tuning.of(group * queries_per_row, dim, keys_per_block, ctas)
    if tuning is None:
        most = f"{Tuning.most_vectors(dim, keys_per_block)} query vectors of {dim} elements"
        raise Unsupported(f"takes at most {most} per row, for all heads that join; got {group * queries_per_row}.")
    keys = own_rows(keys, first_row, len(queries))
    queries, scale = positive_scale(queries, scale)
    static = queries_per_row, keys_per_block, join, heads, scale, tuning
    return _score(static, interpreter(), queries, keys, seen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    static: tuple,
    interpret: Any,
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "B Sw K C"],
    seen: Int32[Array, "#B Tu 2"],
) -> Float32[Array, "B lists rows Sb"]:
    per_row, per_block, join, heads, scale, tuning = static
    (batch, vectors, num_heads, dim), (_, num_keys, kv_heads, _) = queries.shape, keys.shape
    call = Call(
        batch=batch,
        lists=num_heads if heads == "each" else kv_heads,
        kv_heads=kv_heads,
        group=1 if heads == "each" else num_heads // kv_heads,
        dim=dim,
        rows=-(-vectors // per_row),
        blocks=-(-num_keys // per_block),
        per_row=per_row,
        per_block=per_block,
        join=join,
        heads=heads,
        tuning=tuning,
        interpreted=interpret is not None,
    )
    with jax.named_scope("arrange"):
        seen = jnp.clip(seen, 0, num_keys)
        queries, keys = _without_padding(queries, keys, seen)
        queries, query_factor = _halves(call, _arranged_queries(call, queries))
        keys, key_factor = _halves(call, _arranged_keys(call, keys))
        factor = scale * LOG2_E * query_factor * jnp.repeat(key_factor, call.lists // kv_heads, axis=1)
        factor = jnp.maximum(factor, jnp.finfo(_f32).tiny)  # 0 would make NaN of -inf, products that are not seen
        bounds, seen = _bounds(call, seen, vectors)
    scores = sub_block_kernel(call, interpret)(queries, keys, factor, bounds, seen)
    return scores[:, :, : call.rows, : call.blocks]


def _without_padding(
    queries: Float32[Array, "B Tu H C"], keys: Float[Array, "B Sw K C"], seen: Int32[Array, "#B Tu 2"]
) -> tuple[Float32[Array, "B Tu H C"], Float32[Array, "B Sw K C"]]:
    """0 for queries that see nothing and for keys before and behind all that are seen: they must not scale the others."""
    sees, number = seen[..., 0] < seen[..., 1], jnp.arange(keys.shape[1])[None]
    first = jnp.where(sees, seen[..., 0], keys.shape[1]).min(1, keepdims=True)
    end = jnp.where(sees, seen[..., 1], 0).max(1, keepdims=True)
    there = (number >= first) & (number < end)
    return jnp.where(sees[..., None, None], queries, 0), jnp.where(there[..., None, None], keys.astype(_f32), 0)


def _arranged_queries(call: Call, queries: Float32[Array, "B Tu H C"]) -> Float32[Array, "B lists vectors rows C"]:
    """The vectors of a row and the heads that join lie apart, so that they join element by element."""
    queries = _padded(queries, call.padded_rows * call.per_row)
    queries = queries.reshape(call.batch, call.padded_rows, call.per_row, call.lists, call.group, call.dim)
    return queries.transpose(0, 3, 2, 4, 1, 5).reshape(call.batch, call.lists, call.vectors, call.padded_rows, call.dim)


def _arranged_keys(call: Call, keys: Float32[Array, "B Sw K C"]) -> Float32[Array, "B K tiles W C"]:
    """Within a tile, the first vectors of all blocks come first, then the second ones, and so on."""
    keys = _padded(keys, call.tiles * call.tuning.keys)
    keys = keys.reshape(call.batch, call.tiles, call.blocks_per_tile, call.per_block, call.kv_heads, call.dim)
    return keys.transpose(0, 4, 1, 3, 2, 5).reshape(call.batch, call.kv_heads, call.tiles, call.tuning.keys, call.dim)


def _padded(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _halves(
    call: Call, x: Float32[Array, "B heads n m C"]
) -> tuple[Float16[Array, "B heads n m C"], Float32[Array, "B heads"]]:
    """x divided by a factor, a power of two per head that uses the range of float16, and the factor."""
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)  # a vector that is not finite must not take its head along
    exponent = jnp.clip(jnp.frexp(size.max((2, 3, 4)))[1] - _LARGEST, -_MAX_EXPONENT, _MAX_EXPONENT)
    halves = (x * _power_of_two(-exponent)[:, :, None, None, None]).astype(jnp.float16)
    return halves, _power_of_two(exponent)


def _power_of_two(exponent: Int32[Array, "B heads"]) -> Float32[Array, "B heads"]:
    return jnp.ldexp(jnp.ones_like(exponent, _f32), exponent)


def _bounds(
    call: Call, seen: Int32[Array, "b Tu 2"], vectors: int
) -> tuple[Int32[Array, "b row_tiles 4"], Int32[Array, "b 2 per_row rows"]]:
    """For each tile of rows: the first tile of keys that any of its vectors sees, the one after the last, and the same of tiles that
    all of them see in full. And the arguments by row; vectors that do not exist see nothing."""
    size, last = call.tuning.keys, call.tiles
    seen = _padded(seen, call.padded_rows * call.per_row)
    first, end = (seen[..., i].reshape(len(seen), -1, ROWS * call.per_row) for i in range(2))
    number = jnp.arange(call.padded_rows * call.per_row).reshape(1, -1, ROWS * call.per_row)
    sees, counts = first < end, number < call.rows * call.per_row  # the last row counts with all of its vectors
    # One reduction for all four, of which two are minima.
    begin, stop, full_begin, full_stop = jnp.stack(
        [
            -jnp.where(sees, first // size, last),
            jnp.where(sees, -(-end // size), 0),
            jnp.where(counts & sees, -(-first // size), 0),
            -jnp.where(counts, jnp.where(sees, end // size, 0), last),
        ]
    ).max(3)
    bounds = jnp.stack([jnp.minimum(-begin, stop), stop, full_begin, -full_stop], axis=2)
    by_row = seen.reshape(len(seen), call.padded_rows, call.per_row, 2).transpose(0, 3, 2, 1)
    return bounds.astype(_i32), by_row.astype(_i32)

"""`attention_with_block_scores` in XLA, for any device, in one pass over tiles of queries and keys.

The largest score of each block, or the log-sum-exp of its scores, is kept per query until the query's row maximum and sum are final,
which turn it into an exact weight or mass. No array but the results is larger than a tile of queries times the key blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.online_softmax import OnlineSoftmax, dot, finite

_TILE = 256  # tokens of a tile, a multiple of every block size
_QUERY_AXIS = {"output": 1, "lse": 1, "block": 2, "token": 2}


@functools.partial(jax.jit, static_argnames=("block_size", "scale", "block_scores", "token_scores", "statistic"))
def attention_with_block_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    block_size: int,
    scale: float,
    block_scores: bool,
    token_scores: bool,
    statistic: str,
    segment_ids: Int[Array, "B S"],
    query_offset: Int[Array, ""],
) -> tuple:
    """See the function of this name in api.py; padding has segment id 0."""
    (batch, length, heads, head_dim), kv_heads, b = q.shape, k.shape[2], block_size
    num_rows, num_blocks = -(-length // b), -(-k.shape[1] // b)
    tile = min(_TILE, num_rows * b)
    v = jnp.where((segment_ids > 0)[..., None, None], v, 0)  # padding may hold NaN, which a weight of 0 would keep
    padded = length + -length % tile
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, -k.shape[1] % tile + tile)))  # a tile of queries may reach that far
    query_ids = jax.lax.dynamic_slice_in_dim(segment_ids, query_offset, padded, axis=1)
    query_ids = jnp.where(jnp.arange(padded)[None] < length, query_ids, 0)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0))) for x in (q, k, v))
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    per_tile = tile // b

    def query_tile(results, operands):
        i, first = operands
        position = query_offset + i * tile
        q_tile, ids = (jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1) for x in (q, query_ids))
        out, lse, of_blocks = _attend(q_tile, k, v, ids, segment_ids, position, first, b, scale, statistic)
        new = {"output": out.transpose(0, 2, 1, 3).astype(q.dtype), "lse": lse.transpose(0, 2, 1)}
        # The largest weight of each block, or its mass: [B, H, tile, Sb].
        weights = jnp.exp(of_blocks[..., :num_blocks] - finite(lse)[..., None])
        if block_scores:
            new["block"] = _normalise(weights.reshape(batch, heads, per_tile, b, num_blocks).max(3))
        if token_scores:
            grouped = weights.reshape(batch, kv_heads, heads // kv_heads, tile, num_blocks)
            grouped = grouped.mean(2) if statistic == "mass" else grouped.max(2)
            completed = jnp.arange(num_blocks)[None] < ((position + jnp.arange(tile)) // b)[:, None]
            new["token"] = _normalise(jnp.where(completed[None, None], grouped, 0))
        return {name: _put(x, new[name], i, _QUERY_AXIS[name]) for name, x in results.items()}, None

    shapes = {"output": (batch, padded, heads, head_dim), "lse": (batch, padded, heads)}
    if block_scores:
        shapes["block"] = (batch, heads, padded // b, num_blocks)
    if token_scores:
        shapes["token"] = (batch, kv_heads, padded, num_blocks)
    results = {name: jnp.zeros(shape, q.dtype if name == "output" else jnp.float32) for name, shape in shapes.items()}
    number = jnp.arange(padded // tile)
    first = _first_blocks(segment_ids[:, ::b])
    blocks = query_offset // b + number[:, None] * per_tile + jnp.arange(per_tile)[None]
    seen = first.at[blocks].get(mode="fill", fill_value=first.size)
    tiles = number, seen.min(1) // per_tile
    results, _ = jax.lax.scan(query_tile, results, tiles)
    block, token = results.get("block"), results.get("token")
    return (
        results["output"][:, :length],
        results["lse"][:, :length],
        None if block is None else block[:, :, :num_rows],
        None if token is None else token[:, :, :length],
    )


def _put(result: Array, rows: Array, i: Array, axis: int) -> Array:
    """Writes the rows of tile i in place."""
    return jax.lax.dynamic_update_slice_in_dim(result, rows, i * rows.shape[axis], axis)


def _attend(q, k, v, ids, segment_ids, position, first, b, scale, statistic):
    """Attention of a tile of queries over the key tiles from tile `first` to that of the last query.

    Args:
      q: [B, tile, H, D].
      k, v: [B, K, S, D].
      ids: [B, tile], sequences of the queries.
      segment_ids: [B, S] and padding.
      position: position of the first query.
      first: index of the first key tile.
      b, scale, statistic: block size, factor on the scores, and what is kept of each block.

    Returns:
      output [B, H, tile, D], lse [B, H, tile], and the largest score, or the log-sum-exp of the scores, of each block
      [B, H, tile, S / b], -inf if unseen.
    """
    (batch, tile, heads, head_dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    q = (
        q.reshape(batch, tile, kv_heads, group, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, -1, head_dim)
    )
    ids = ids[:, :, None]
    query = position + jnp.arange(tile)[None, :, None]
    rows = (batch, kv_heads, group * tile)

    def step(j, carry):
        state, kept = carry
        k_tile, v_tile, key_ids = (
            jax.lax.dynamic_slice_in_dim(x, j * tile, tile, axis) for x, axis in ((k, 2), (v, 2), (segment_ids, 1))
        )
        key = j * tile + jnp.arange(tile)[None, None]
        mask = (key <= query) & (ids == key_ids[:, None]) & (ids > 0)  # [B, tile, tile]
        scores = scale * dot("bkqd,bksd->bkqs", q, k_tile)
        scores = jnp.where(mask[:, None, None], scores.reshape(batch, kv_heads, group, tile, tile), -jnp.inf)
        scores = scores.reshape(*rows, tile)
        state = state.add(scores, v_tile)
        if statistic == "mass":
            # The softmax's own weights, computed once: XLA merges equal expressions.
            weights = jnp.exp(scores - state.maximum[..., None])
            of_blocks = state.maximum[..., None] + jnp.log(weights.reshape(*rows, tile // b, b).sum(-1))
        else:
            of_blocks = scores.reshape(*rows, tile // b, b).max(-1)
        return state, jax.lax.dynamic_update_slice_in_dim(kept, of_blocks, j * (tile // b), axis=3)

    start = (OnlineSoftmax.empty(*rows, head_dim), jnp.full((*rows, k.shape[2] // b), -jnp.inf, jnp.float32))
    last = jnp.minimum((position + tile - 1) // tile, k.shape[2] // tile - 1)
    state, kept = jax.lax.fori_loop(first, last + 1, step, start)
    return tuple(x.reshape(batch, heads, tile, *x.shape[3:]) for x in (*state.finish(), kept))


def _first_blocks(block_ids: Int[Array, "B Sb"]) -> Int[Array, "Sb"]:
    """First block that the queries of each block see. The tokens of a block belong to one sequence."""
    blocks = jnp.arange(block_ids.shape[1])
    first = jnp.argmax(block_ids[:, :, None] == block_ids[:, None, :], axis=-1)
    return jnp.where(block_ids > 0, first, blocks[None]).min(0)


def _normalise(scores: Float32[Array, "... Sb"]) -> Float32[Array, "... Sb"]:
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)

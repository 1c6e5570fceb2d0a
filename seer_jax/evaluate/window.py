"""Sparse decoding of whole windows in one pass: every token attends by a list of its own, as if it were appended to the cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.checks import BLOCK_SIZES
from pallas_kernels.devices import default_device
from pallas_kernels.online_softmax import OnlineSoftmax, dot
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.models.dense_attention import dense_attention
from seer_jax.models.rope import rotate
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.policies import Dense, Policy
from seer_jax.sharding.on_mesh import OF_LAYERS_AND_ROWS, OF_ROWS
from seer_jax.sharding.shard import Shard
from seer_jax.sharding.table import KV, ROWS

MOST_TILES = 8
Observe = Callable[[DecodeContext], Any]
Look = Callable[[DecodeContext, Policy], Any]  # also at the policy of the layer
OF_LISTS = P(None, ROWS, None, KV)  # [L, B, T, K, ...]


class AtOnce(NamedTuple):
    """How much of a window is computed at once.

    It changes speed and memory alone. On a CPU larger chunks only take more memory. A GPU launches about a hundred small kernels for each
    chunk in each layer, and waits for the host after each tile of keys, which takes longer than the arithmetic of a small chunk.

    Fields:
      tokens: most tokens of a chunk.
      scores: most attention scores of a chunk, [H, chunk, S], for scorers that hold all of them: 4 bytes each.
      keys: least keys of a tile.
    """

    tokens: int
    scores: int
    keys: int

    @classmethod
    def here(cls) -> "AtOnce":
        """For the default device: that of a traced computation is not known yet."""
        return ON_CPUS if default_device().platform == "cpu" else ON_GPUS


ON_CPUS, ON_GPUS = AtOnce(256, 2**25, 512), AtOnce(1024, 2**28, 2048)


class DecodedWindow(NamedTuple):
    """What one pass over windows gives.

    Fields:
      hidden: hidden states after the final norm.
      kept: share of the visible blocks that each token read in each layer; the token at position t sees floor(t / b) + 1 of them.
      observed: what `observe` returned, with axes [L, B, T] in front; None without it.
    """

    hidden: Float[Array, "B T E"]
    kept: Float32[Array, "L B T"]
    observed: Any


class Token(NamedTuple):
    """Queries before and after RoPE, and the position; of several tokens with a leading axis."""

    q: Float[Array, "*n H D"]
    q_rotated: Float[Array, "*n H D"]
    position: Int[Array, "*n"]


def decode_window(
    model: Transformer, tokens: Int[Array, "B T"], policy: Policy = Dense(), *, observe: Observe | None = None
) -> DecodedWindow:
    """Decodes every token of windows by the policy, in one pass through the layers.

    Each token gets the `DecodeContext` that it would have if it were appended to a cache of T slots, and attends to the blocks of
    `policy.blocks(context)`. The results are those of appending the tokens one at a time. Takes time O(T^2) like dense attention, and
    memory O(T): tokens are taken in chunks, rows one after the other, since each fills the device. To be called under `jax.jit`.

    Args:
      model: with the decode gate that the policy needs.
      tokens: rows of T tokens, no padding.
      policy: which key blocks each token reads; its dense first layers are dense.
      observe: called with the context of each token and layer, whatever the policy keeps there; returns a pytree of arrays, for example
        a scorer's scores of one row: `lambda context: Oracle().decode_scores(context)[0]`, which gives `observed` the shape
        [L, B, T, K, Sb]. It is traced under `jax.vmap` over tokens that share their keys, so that what depends on keys alone is
        computed once for a chunk. With `policy=Dense()` it sees what gates are distilled from. On a mesh the context is that of the
        key/value heads of one device, and what it returns must have these heads first.

    Raises:
      ValueError: the policy is none, or does not fit the model.
      NotImplementedError: the model lies on a mesh, and `observe` returns arrays without heads.
    """
    tokens, _ = model.check(tokens, None)
    segments = model.segments(policy, model.decode_gate, model.config.num_kv_heads, "decode")
    decode = functools.partial(decode_rows, None if observe is None else lambda context, policy: observe(context))
    return DecodedWindow(*model.spread(decode, (OF_ROWS, OF_LAYERS_AND_ROWS, OF_LISTS), segments, tokens))


def decode_rows(
    look: Look | None,
    model: Transformer,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    *,
    dense: bool = False,
) -> tuple[Float[Array, "B T E"], Float32[Array, "L B T"], Any]:
    """The fields of `DecodedWindow`, for `Transformer.spread`.

    Args:
      look: as `observe` of `decode_window`, and gets the layer's policy too.
      model, segments, tokens: see `Transformer.spread`.
      dense: attend to every block, whatever the policies keep: these are for `look` alone.
    """
    gate = None if model.decode_gate is None else model.decode_gate.config
    layer = dataclasses.replace(model.config, num_layers=1)

    def decode(row: Int[Array, "T"]) -> tuple[Array, Any]:
        cache = Cache.create(layer, 1, len(row), model.dtype, decode_gate=gate)  # of one layer after the other
        attend = functools.partial(_attend, model, look, dense)
        hidden, _, aux = model.scan(row[None], attend, cache, segments=segments)
        return hidden[0], aux

    hidden, aux = jax.lax.map(decode, tokens)
    kept, observed = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), aux)
    if model.shard is None:
        return hidden, kept, observed
    heads = model.config.num_kv_heads
    if wrong := [x.shape[3:] for x in jax.tree.leaves(observed) if x.shape[3:4] != (heads,)]:
        raise NotImplementedError(
            f"What `observe` returns of a model on a mesh must be arrays with the {heads} key/value heads of its device first, which are "
            f"joined with those of the others; got shape {wrong[0]}. Return values per head, or load the model without a mesh."
        )
    return hidden, model.shard.mean_over_tensor(kept), observed


def token_contexts(
    layer: LayerContext,
    cache: Cache,
    k: Float[Array, "1 T K D"],
    k_rotated: Float[Array, "1 T K D"],
    v: Array,
    shard: Shard | None,
) -> tuple[Cache, Callable[[Token], DecodeContext]]:
    """The contexts that the tokens of one window would have in a layer if each were appended to the cache.

    Args:
      layer: of the model.
      cache: of one layer and one row with T slots; what it held is lost.
      k, k_rotated: before and after RoPE.
      v: values.
      shard: see `DecodeContext`; queries must be those of whole groups of heads then (`Shard.group`).

    Returns:
      (the filled cache, a function that gives the context of one token).
    """
    first = jnp.int32(0)
    cache = cache.fill(first, k_rotated, v)
    if layer.decode_gate is not None:
        # The keys of a block do not depend on later tokens, and a token reads those of the blocks before its own.
        cache = cache.fill_decode_gate(first, layer.decode_gate, k, jnp.full(1, k.shape[1], jnp.int32))

    def context_of(token: Token) -> DecodeContext:
        return DecodeContext(
            q=token.q[None, None],
            q_rotated=token.q_rotated[None, None],
            cache=cache.with_lengths(token.position[None]).view(first),
            layer=layer.index,
            block_size=layer.policy.tokens_per_block(layer.decode_gate),
            gate=layer.decode_gate,
            shard=shard,
        )

    return cache, context_of


def _attend(
    model: Transformer,
    look: Look | None,
    dense: bool,
    layer: LayerContext,
    cache: Cache,
    q: Array,
    k: Array,
    v: Array,
) -> tuple[Float[Array, "1 T H D"], Cache, Any]:
    """Attention of one layer of one window; q and k before RoPE."""
    shard, positions = model.shard, jnp.arange(q.shape[1], dtype=jnp.int32)
    q_rotated, k_rotated = rotate(q, k, positions[None], model.config.rope)
    cache, context_of = token_contexts(layer, cache, k, k_rotated, v, shard)
    keys, values = jnp.swapaxes(k_rotated[0], 0, 1), jnp.swapaxes(v[0], 0, 1)
    block_size = layer.policy.tokens_per_block(layer.decode_gate)
    dense = dense or layer.policy.is_dense

    def choose(token: Token) -> tuple[Any, Any]:
        """Blocks that the token keeps, `[K, Sb]`, and what is observed of it."""
        context = context_of(token)
        blocks = None if dense else layer.policy.blocks(context)
        mask = None if blocks is None else blocks.to_mask(context.num_key_blocks)[0]
        return mask, None if look is None else look(context, layer.policy)

    def attend(tokens: Token) -> tuple[Any, Any, Any]:
        with jax.named_scope("choose"):
            mask, observed = jax.vmap(choose)(tokens)
        if mask is None:
            return None, None, observed
        with jax.named_scope("window_attention"):
            out = _attend_blocks(tokens, keys, values, mask, block_size)
        return out, mask.sum((1, 2)) / mask.shape[1] / (tokens.position // block_size + 1), observed

    if dense and look is None:
        out = kept = observed = None
    else:
        # A list is chosen by all query heads of a group: devices that share the group's keys attend with all of them.
        grouped = q if shard is None else shard.group(q)
        rotated = q_rotated if grouped is q else rotate(grouped, k, positions[None], model.config.rope)[0]
        out, kept, observed = _map_chunks(attend, Token(grouped[0], rotated[0], positions))
    if out is None or kept is None:
        out, kept = dense_attention(q_rotated, k_rotated, v), jnp.ones(len(positions), jnp.float32)
    else:
        out = out[None] if shard is None else shard.own_heads(out[None])
    return out, cache, (kept, observed)


def _map_chunks(function: Callable[[Token], Any], tokens: Token) -> Any:
    """`function` of all tokens, a chunk at a time. The last chunk repeats the last token, whose results are dropped."""
    count, heads, _ = tokens.q.shape
    most = AtOnce.here()
    size = min(most.tokens, max(1, most.scores // (heads * count)), count)
    places = jnp.minimum(jnp.arange(-(-count // size) * size), count - 1).reshape(-1, size)
    results = jax.lax.map(lambda places: function(Token(*(x[places] for x in tokens))), places)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)


def _attend_blocks(
    tokens: Token,
    keys: Float[Array, "K S D"],
    values: Float[Array, "K S D"],
    mask: Bool[Array, "n K Sb"],
    block_size: int,
) -> Float[Array, "n H D"]:
    """Attention to the keys of the kept blocks up to each token's own, with the arithmetic of `sparse_decode_attention` in XLA.

    Keys are taken a tile at a time, up to that of the last token: dense products under a mask, since neighbouring tokens keep other blocks.
    """
    (count, heads, dim), (kv_heads, size, _) = tokens.q.shape, keys.shape
    tile = _tile(size)
    tiles = -(-size // tile)
    keys, values = (jnp.pad(x, ((0, 0), (0, tiles * tile - size), (0, 0))) for x in (keys, values))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, tiles * tile // block_size - mask.shape[2])))
    queries = tokens.q_rotated.reshape(count, kv_heads, -1, dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, dim)

    def add(place: Int[Array, ""], sums: OnlineSoftmax) -> OnlineSoftmax:
        def part(x: Array, axis: int, unit: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, place * (tile // unit), tile // unit, axis)

        seen = (place * tile + jnp.arange(tile))[None] <= tokens.position[:, None]
        listed = jnp.repeat(part(mask, 2, block_size), block_size, axis=2) & seen[:, None]
        scores = dot("kmd,ksd->kms", queries, part(keys, 1, 1)) * dim**-0.5
        scores = jnp.where(jnp.swapaxes(listed, 0, 1)[:, :, None], scores.reshape(kv_heads, count, -1, tile), -jnp.inf)
        return sums.add(scores.reshape(kv_heads, -1, tile), part(values, 1, 1))

    needed = tokens.position[-1] // tile + 1
    out, _ = jax.lax.fori_loop(jnp.int32(0), needed, add, OnlineSoftmax.empty(*queries.shape)).finish()
    out = out.reshape(kv_heads, count, -1, dim).transpose(1, 0, 2, 3)
    return out.reshape(count, heads, dim).astype(tokens.q.dtype)


def _tile(size: int) -> int:
    """Keys at a time: whole blocks of any size, few enough that little of the future is computed, and that few tiles make a window."""
    keys = min(max(AtOnce.here().keys, -(-size // MOST_TILES)), size)
    return -(-keys // BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]

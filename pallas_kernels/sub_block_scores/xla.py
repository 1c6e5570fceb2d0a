"""`score_sub_blocks` in XLA, for any device.

Many query vectors are taken in chunks of rows, so that no array is larger than a chunk's products; gradients compute these again. The
products of few query vectors, while decoding, read the keys in place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.online_softmax import finite, log_sum_exp
from pallas_kernels.precision import precise_einsum

ELEMENTS = 2**23  # products of a chunk, unless a single row has more
FEW = 16  # query vectors per key head up to which a sum of products reads the keys in place


class _Settings(NamedTuple):
    """The static arguments of `score_sub_blocks`."""

    queries_per_row: int
    keys_per_block: int
    join: str
    heads: str
    scale: float


@functools.partial(jax.jit, static_argnames=_Settings._fields)
def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "P Sw K C"],
    *,
    seen: Int32[Array, "#B Tu 2"],
    first_row: Int32[Array, ""] | None,
    **static: Any,
) -> Float32[Array, "B lists rows Sb"]:
    """See the function of this name in api.py."""
    return _score(_Settings(**static), queries, own_rows(keys, first_row, len(queries)), seen)


@functools.partial(jax.jit, static_argnames=_Settings._fields)
def score_sub_blocks_gradients(
    cotangent: Float32[Array, "B lists rows Sb"],
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "P Sw K C"],
    *,
    seen: Int32[Array, "#B Tu 2"],
    first_row: Int32[Array, ""] | None,
    **static: Any,
) -> tuple[Float32[Array, "B Tu H C"], Float[Array, "P Sw K C"]]:
    """Gradients in queries and keys."""
    own, pull_back = jax.vjp(lambda keys: own_rows(keys, first_row, len(queries)), keys)
    of_queries, of_own = _gradients(_Settings(**static), cotangent, queries, own, seen)
    return of_queries, *pull_back(of_own)


def own_rows(keys: Float[Array, "P Sw K C"], first: Int32[Array, ""] | None, number: int) -> Float[Array, "B Sw K C"]:
    """The rows of keys that belong to the queries.

    Cut by head, as caches keep them: XLA then cancels the transpositions of the caller, of this, and of the products.
    """
    if first is None:
        return keys
    return lax.dynamic_slice_in_dim(keys.swapaxes(1, 2), first, number).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    settings: _Settings,
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "B Sw K C"],
    seen: Int32[Array, "#B Tu 2"],
) -> Float32[Array, "B lists rows Sb"]:
    (batch, vectors, num_heads, _), (_, num_keys, kv_heads, _) = queries.shape, keys.shape
    if vectors * num_heads // kv_heads <= FEW:
        return _join(settings, _few_products(queries * settings.scale, keys), seen)
    chunks, keys = _Chunks.of(settings, queries, keys), _by_head(keys)
    lists, blocks = num_heads if settings.heads == "each" else kv_heads, -(-num_keys // settings.keys_per_block)

    def chunk(scores: Array, i: Array) -> tuple[Array, None]:
        return chunks.put(scores, _rows(settings, chunks.take(queries, i), keys, chunks.take(seen, i)), i, 2), None

    queries, seen = (chunks.pad(x, chunks.vectors, 1) for x in (queries, seen))
    scores = jnp.zeros((batch, lists, chunks.number * chunks.rows, blocks), jnp.float32)
    scores, _ = lax.scan(chunk, scores, jnp.arange(chunks.number))
    return scores[:, :, : -(-vectors // settings.queries_per_row)]


def _gradients(
    settings: _Settings,
    cotangent: Float32[Array, "B lists rows Sb"],
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "B Sw K C"],
    seen: Int32[Array, "#B Tu 2"],
) -> tuple[Float32[Array, "B Tu H C"], Float[Array, "B Sw K C"]]:
    vectors, dtype = queries.shape[1], keys.dtype
    chunks = _Chunks.of(settings, queries, keys)
    queries, keys = without_unseen(queries, keys, seen)  # which the products of gradients would multiply by 0
    keys = _by_head(keys)
    queries, seen = (chunks.pad(x, chunks.vectors, 1) for x in (queries, seen))
    cotangent = chunks.pad(cotangent, chunks.rows, 2)

    def chunk(gradients: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        score = functools.partial(_rows, settings, seen=chunks.take(seen, i))
        _, pull_back = jax.vjp(score, chunks.take(queries, i), keys)
        of_queries, of_keys = pull_back(chunks.take(cotangent, i, 2))
        return (chunks.put(gradients[0], of_queries, i, 1), gradients[1] + of_keys), None

    (d_queries, d_keys), _ = lax.scan(chunk, (jnp.zeros_like(queries), jnp.zeros_like(keys)), jnp.arange(chunks.number))
    return d_queries[:, :vectors], d_keys.transpose(0, 2, 1, 3).astype(dtype)


def _forward_rule(settings: _Settings, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _score(settings, *arrays), arrays


def _backward_rule(settings: _Settings, arrays: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    return *_gradients(settings, cotangent, *arrays), None


_score.defvjp(_forward_rule, _backward_rule)


class _Chunks(NamedTuple):
    """Chunks of rows.

    Fields:
      number: how many there are.
      rows, vectors: rows and query vectors of each.
    """

    number: int
    rows: int
    vectors: int

    @classmethod
    def of(cls, settings: _Settings, queries: Float32[Array, "B Tu H C"], keys: Float[Array, "B Sw K C"]) -> "_Chunks":
        batch, vectors, heads, _ = queries.shape
        rows, per_row = -(-vectors // settings.queries_per_row), settings.queries_per_row
        most = max(1, ELEMENTS // (batch * heads * per_row * keys.shape[1]))
        number = -(-rows // most)
        rows = -(-rows // number)
        return cls(number, rows, rows * per_row)

    def pad(self, x: Array, size: int, axis: int) -> Array:
        """x with zeros up to whole chunks, which have `size` elements along the axis: padding sees nothing."""
        pad = [(0, self.number * size - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return jnp.pad(x, pad)

    def take(self, x: Array, i: Array, axis: int = 1) -> Array:
        size = x.shape[axis] // self.number
        return lax.dynamic_slice_in_dim(x, i * size, size, axis)

    def put(self, x: Array, part: Array, i: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(x, part, i * part.shape[axis], axis)


def without_unseen(
    queries: Float32[Array, "B Tu H C"], keys: Float[Array, "B Sw K C"], seen: Int32[Array, "#B Tu 2"]
) -> tuple[Float32[Array, "B Tu H C"], Float[Array, "B Sw K C"]]:
    """Queries that see nothing and keys that no query sees become 0."""
    sees, last = seen[..., 0] < seen[..., 1], keys.shape[1]
    begins, ends = (jnp.where(sees, jnp.clip(seen[..., i], 0, last), last) for i in range(2))

    def covered(begins: Int32[Array, "Tu"], ends: Int32[Array, "Tu"]) -> Array:
        return jnp.zeros(last + 1, jnp.int32).at[begins].add(1).at[ends].add(-1).cumsum()[:last] > 0

    there = jax.vmap(covered)(begins, ends)
    return tuple(jnp.where(x[..., None, None], y, 0) for x, y in ((sees, queries), (there, keys)))  # pyright: ignore


def _by_head(keys: Float[Array, "B Sw K C"]) -> Float32[Array, "B K Sw C"]:
    return keys.astype(jnp.float32).transpose(0, 2, 1, 3)


def _rows(
    settings: _Settings,
    queries: Float32[Array, "B u H C"],
    keys: Float32[Array, "B K Sw C"],
    seen: Int32[Array, "#B u 2"],
) -> Float32[Array, "B lists rows Sb"]:
    """Scores of a chunk of rows."""
    (batch, vectors, _, dim), (_, kv_heads, num_keys, _) = queries.shape, keys.shape
    grouped = (queries * settings.scale).transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, dim)
    products = precise_einsum("bkmc,bkwc->bkmw", grouped, keys)
    return _join(settings, products.reshape(batch, kv_heads, -1, vectors, num_keys), seen)


@jax.custom_batching.custom_vmap
def _few_products(queries: Float32[Array, "B u H C"], keys: Float[Array, "B Sw K C"]) -> Float32[Array, "B K G u Sw"]:
    """A sum of products, which XLA fuses with the conversion of the keys; a matrix product may copy them first, in float32.

    By key head: caches hold the keys of a head together, and this transposition cancels that of the caller.
    """
    batch, vectors, _, dim = queries.shape
    grouped = queries.reshape(batch, vectors, keys.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
    return (grouped[..., None, :] * _by_head(keys)[:, :, None, None]).sum(-1)


@_few_products.def_vmap
def _many_products(
    number: int, batched: list[bool], queries: Float32[Array, "n B u H C"], keys: Float[Array, "*n B Sw K C"]
) -> tuple[Float32[Array, "n B K G u Sw"], bool]:
    """Of many tokens that share their keys: a matrix product, since a fused sum would read the keys again for each of them."""
    if batched == [True, False]:
        kv_heads = keys.shape[2]
        grouped = queries.reshape(*queries.shape[:3], kv_heads, -1, queries.shape[-1])
        return precise_einsum("nbukgc,bkwc->nbkguw", grouped, _by_head(keys)), True
    queries, keys = (
        x if b else jnp.broadcast_to(x, (number, *x.shape)) for x, b in zip((queries, keys), batched, strict=True)
    )
    return jax.lax.map(lambda pair: _few_products(*pair), (queries, keys)), True


def _join(
    settings: _Settings, products: Float32[Array, "B K G u Sw"], seen: Int32[Array, "#B u 2"]
) -> Float32[Array, "B lists rows Sb"]:
    """Scores of blocks from products of query and key vectors."""
    number = jnp.arange(products.shape[-1])[None, None]
    sees = (number >= seen[..., :1]) & (number < seen[..., 1:])
    logits = _parts(jnp.where(sees[:, None, None], products, -jnp.inf), 4, settings.keys_per_block)
    sums = log_sum_exp(logits, axis=-1)
    lse = finite(log_sum_exp(sums, axis=-1))[..., None]
    shares = (sums if settings.join == "sum" else logits.max(-1)) - lse  # [B, K, G, u, Sb]
    if settings.heads == "each":
        shares = shares.reshape(shares.shape[0], -1, *shares.shape[3:])
    elif settings.heads == "max":
        shares = shares.max(2)
    else:
        shares = log_sum_exp(shares - jnp.log(shares.shape[2]), axis=2)
    return _parts(shares, 2, settings.queries_per_row).max(3)


def _parts(x: Array, axis: int, size: int) -> Array:
    """Splits an axis into parts of that size, the last one filled up with -inf."""
    pad = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
    x = jnp.pad(x, pad, constant_values=-jnp.inf)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])

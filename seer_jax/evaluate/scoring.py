"""Likelihood of given tokens under a sparsity policy: of prompts and decoded windows in one pass, or token by token."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from seer_jax.evaluate.window import decode_rows
from seer_jax.models.attention import prefill_attention
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.passes import read_layers
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.selection.policies import Dense, Policy
from seer_jax.sharding.on_mesh import OF_LAYERS_AND_ROWS, OF_ROWS
from seer_jax.sharding.table import DATA, FSDP
from seer_jax.sharding.vocabulary import score_targets

HEAD_CHUNK = 256  # tokens whose logits exist at once


def perplexity(nll: Float[np.ndarray, "..."]) -> float:
    """exp(mean negative log likelihood): how many equally likely tokens the model seems to choose from; inf beyond the floats."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(nll, dtype=np.float64)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """A model's predictions of given tokens.

    Attributes:
      nll: -log p(token | the tokens before it), nats.
      best: whether the token is the most likely one.
      kept: share of the visible key blocks that attention read, mean over layers (and steps, while decoding).
    """

    nll: Float32[Array | np.ndarray, "B n"]
    best: Bool[Array | np.ndarray, "B n"]
    kept: Float32[Array | np.ndarray, "B"]


@jax.jit
def score_prompts(model: Transformer, tokens: Int[Array, "B T"], policy: Policy = Dense()) -> TokenScores:
    """Scores tokens 1 .. T-1 of each row in one pass: the policy works on prompts.

    Args:
      tokens: rows of T tokens, no padding.
      policy: which key blocks the attention keeps.
    """
    tokens, _ = model.check(tokens, None)
    segments = model.segments(policy, model.prefill_gate, model.config.num_heads, "prefill")
    return model.everywhere(TokenScores(*model.spread(_score_prompts, (OF_ROWS,) * 3, segments, tokens)))


def _score_prompts(model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"]) -> tuple[Array, ...]:
    hidden, kept = read_layers(model, segments, tokens, jnp.full(len(tokens), tokens.shape[1], jnp.int32))
    return (*score_rows(model, hidden, tokens), kept.mean(0))


@jax.jit
def score_windows(model: Transformer, tokens: Int[Array, "B T"], policy: Policy = Dense()) -> TokenScores:
    """Scores tokens 1 .. T-1 of each row as `score_decoded` does from an empty cache on, but in one pass: the policy works on each token.

    Args:
      tokens: rows of T tokens, no padding.
      policy: which key blocks each token reads.

    Returns:
      `kept` is the share of the causal blocks: the sum over tokens of kept blocks over that of visible ones.
    """
    tokens, _ = model.check(tokens, None)
    segments = model.segments(policy, model.decode_gate, model.config.num_kv_heads, "decode")
    nll, best, kept = model.spread(_score_windows, (OF_ROWS, OF_ROWS, OF_LAYERS_AND_ROWS), segments, tokens)
    visible = jnp.arange(tokens.shape[1]) // policy.tokens_per_block(model.decode_gate) + 1.0
    share = jnp.einsum("lbt,t->b", kept, visible) / (len(kept) * visible.sum())
    return model.everywhere(TokenScores(nll, best, share))


def _score_windows(model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"]) -> tuple[Array, ...]:
    hidden, kept, _ = decode_rows(None, model, segments, tokens)
    return (*score_rows(model, hidden, tokens), kept)


def score_rows(
    model: Transformer, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"]
) -> tuple[Float32[Array, "B n"], Bool[Array, "B n"]]:
    """-log p of tokens 1 .. T-1 of each row, and whether each is the most likely one; see `Transformer.spread` for the model."""
    nll, best = score_tokens(model, hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1))
    shape = (tokens.shape[0], -1)
    return nll.reshape(shape), best.reshape(shape)


def score_tokens(
    model: Transformer, hidden: Float[Array, "n E"], targets: Int[Array, "n"]
) -> tuple[Float32[Array, "n"], Bool[Array, "n"]]:
    """Scores of the targets; logits exist for a chunk of tokens at a time, never for a whole prompt."""
    count, size = len(targets), min(HEAD_CHUNK, len(targets))

    def chunk(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return score_targets(model.logits(x[0]), x[1], model.shard)

    pad = -count % size
    chunks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1]), jnp.pad(targets, (0, pad))
    nll, best = jax.lax.map(chunk, (chunks[0], chunks[1].reshape(-1, size)))
    return nll.reshape(-1)[:count], best.reshape(-1)[:count]


@functools.partial(jax.jit, static_argnames="keep")
def read_prompts(model: Transformer, tokens: Int[Array, "B T"], *, keep: int) -> tuple[TokenScores, Cache]:
    """Dense attention over prompts: scores of their tokens, and the cache of the first `keep` tokens of each.

    Every decode policy starts from that cache; it has room for the remaining tokens. Rows are read one after the other, since each
    fills the device.

    Args:
      tokens: rows of T tokens, no padding.
      keep: tokens in the cache, at most T.
    """
    tokens, _ = model.check(tokens, None)
    like = model.make_cache(1, 1)  # of which arrays the cache is made, and how they are split
    results = (*(OF_ROWS,) * 3, tuple(like.specs()))
    segments = [Segment(model.config.num_layers)]
    *scores, cache = model.spread(functools.partial(_read_rows, keep), results, segments, tokens)
    return model.everywhere(TokenScores(*scores)), jax.tree.unflatten(jax.tree.structure(like), cache)


def _read_rows(
    keep: int, model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"]
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Scores of the tokens, and the arrays of the cache."""
    whole, kept = (jnp.full(1, n, jnp.int32) for n in (tokens.shape[1], keep))

    def attend(layer: LayerContext, cache: Cache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, whole)
        out, share = prefill_attention(layer.policy, context)
        cache = cache.fill(layer.index, context.k_rotated, v)
        if layer.decode_gate is not None:
            cache = cache.fill_decode_gate(layer.index, layer.decode_gate, k, kept)
        return out, cache, share

    def read(row: Int[Array, "T"]) -> tuple[tuple, Cache]:
        hidden, cache, share = model.scan(row[None], attend, model.make_cache(1, len(row)), segments=segments)
        if model.shard is not None:
            share = model.shard.mean_over_tensor(share)
        # Slots after the first tokens are overwritten before they are read.
        return (*score_tokens(model, hidden[0, :-1], row[1:]), share.mean()), cache.with_lengths(kept)

    def join(x: Array) -> Array:  # [rows, L, 1, ...] or, of lengths, [rows, 1]
        return x[:, 0] if x.ndim == 2 else jnp.swapaxes(x[:, :, 0], 0, 1)

    scores, caches = jax.lax.map(read, tokens)
    return *scores, tuple(map(join, jax.tree.leaves(caches)))


@jax.jit
def score_decoded(model: Transformer, cache: Cache, tokens: Int[Array, "B n"], policy: Policy = Dense()) -> TokenScores:
    """Appends given tokens 0 .. n-2 one at a time, whatever the model would have drawn, and scores tokens 1 .. n-1.

    Args:
      cache: of the tokens before them; it is not changed.
      tokens: the continuation.
      policy: which key blocks each new token reads.
    """

    def step(cache: Cache, pair: tuple[jax.Array, jax.Array]) -> tuple[Cache, tuple[jax.Array, ...]]:
        logits, cache, kept = model.decode(pair[0], cache, sparsity=policy)
        return cache, (*score_targets(logits, pair[1], None), kept.mean(0))

    _, (nll, best, kept) = jax.lax.scan(step, cache, (tokens[:, :-1].T, tokens[:, 1:].T))
    return model.everywhere(TokenScores(nll.T, best.T, kept.mean(0)))


def score_each(
    score: Callable[..., TokenScores], model: Transformer, tokens: Int[np.ndarray, "n T"], policy: Policy
) -> TokenScores | None:
    """Scores of rows, one after the other, on a mesh as many at a time as it has devices for them; None without rows.

    Args:
      score: `score_prompts` or `score_windows`.
    """
    found = []
    for batch, count in row_batches(model, tokens):
        scores = jax.device_get(score(model, batch, policy))
        found.append(jax.tree.map(lambda x, count=count: x[:count], scores))
    return concatenate_scores(found)


def concatenate_scores(parts: Sequence[TokenScores]) -> TokenScores | None:
    """Scores of all rows of parts; None of none."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else None


def row_batches(model: Transformer, tokens: Int[np.ndarray, "n T"]) -> Iterator[tuple[Int[np.ndarray, "B T"], int]]:
    """Rows for passes that fill the devices: one row, on a mesh one for each of the devices that have rows of their own.

    Yields:
      (rows, how many of them are new: the last batch repeats its last row).
    """
    size = 1 if model.layout is None else model.layout.size(DATA, FSDP)
    for first in range(0, len(tokens), size):
        batch = tokens[first : first + size].astype(np.int32)
        yield np.pad(batch, ((0, size - len(batch)), (0, 0)), mode="edge"), len(batch)

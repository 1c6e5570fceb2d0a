"""Block maps of a text: the true attention of every layer and head by blocks, a scorer's prediction, and the blocks that a policy keeps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32, Int

from pallas_kernels import BlockIndices, attention_with_block_scores
from seer_jax.evaluate.window import OF_LISTS, decode_rows
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.selection.context import DecodeContext
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RankingPolicy
from seer_jax.selection.scorers import Oracle
from seer_jax.sharding.on_mesh import OF_LAYERS_AND_ROWS, OF_ROWS
from seer_jax.sharding.table import TENSOR

LOCAL = 2  # blocks up to the row's own that any window would keep
ROWS = 128  # tokens whose decode maps are kept, by default
GOLDEN = (5**0.5 - 1) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMaps:
    """Attention of one text by blocks, for every layer and list of blocks; 0 behind each row's own block.

    At prefill a row is a block of queries and Hs = H query heads; while decoding a row is a token and Hs = K key/value heads.

    Attributes:
      true: largest attention weight of each block (over the queries of the row, while decoding over the heads of the group), divided
        by the sum of its row: the target of the gate.
      scores: softmax of the scorer's scores, while decoding over the blocks before the token's own, which is always kept.
      kept: the blocks that the policy keeps.
      density: share of the visible blocks that each list keeps, over all rows of the text.
      last: position of each row's last query token.
      block_size: b, tokens.
    """

    true: Float32[Array | np.ndarray, "*L Hs R Sb"]
    scores: Float32[Array | np.ndarray, "*L Hs R Sb"]
    kept: Bool[Array | np.ndarray, "*L Hs R Sb"]
    density: Float32[Array | np.ndarray, "*L Hs"]
    last: Int[Array | np.ndarray, "R"]
    block_size: int = dataclasses.field(metadata=dict(static=True))

    @property
    def visible(self) -> Int[np.ndarray, "R"]:
        """How many blocks each row sees."""
        return np.asarray(self.last) // self.block_size + 1


def block_maps(model: Transformer, tokens: Int[Array | np.ndarray, "T"], policy: RankingPolicy) -> BlockMaps:
    """Maps of one prompt. Attention itself is dense, so that every layer reads what it would read in training.

    Args:
      model: with a prefill gate where the policy needs one.
      tokens: the prompt.
      policy: what ranks the blocks, and how many are kept; for example `TopK(0.1, dense_last_rows=0)`.

    Raises:
      ValueError: the tokens are no integers [T] of the model's vocabulary, or the policy is no ranking or does not fit the model.
    """
    return _block_maps(model, _checked(model, tokens, policy), policy)


def decode_block_maps(
    model: Transformer, tokens: Int[Array | np.ndarray, "T"], policy: RankingPolicy, *, rows: int = ROWS
) -> BlockMaps:
    """Maps of tokens as they are decoded, each with a list of its own. Attention itself is dense, as in `block_maps`.

    Args:
      model: with a decode gate where the policy needs one.
      tokens: the text; every token counts in `density`.
      policy: what ranks the blocks, and how many are kept; for example `TopK(0.1)`.
      rows: number of tokens whose maps are returned, spread over the text (`spread_tokens`); more than there are: all.

    Raises:
      ValueError: see `block_maps`; or rows is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}.")
    checked = _checked(model, tokens, policy)
    return _decode_block_maps(model, checked, policy, jnp.asarray(spread_tokens(len(checked), rows)))


def spread_tokens(count: int, rows: int) -> Int[np.ndarray, "rows"]:
    """Positions of tokens spread evenly over a text, at places within their blocks that differ from row to row.

    >>> spread_tokens(6, 3).tolist(), spread_tokens(3, 8).tolist()
    ([0, 3, 4], [0, 1, 2])
    """
    if rows >= count:
        return np.arange(count)
    edges = np.arange(rows + 1) * count // rows
    return edges[:-1] + (np.arange(rows) * GOLDEN % 1 * np.diff(edges)).astype(int)


def _checked(model: Transformer, tokens: Any, policy: RankingPolicy) -> Int[Array, "T"]:
    if not isinstance(policy, RankingPolicy):
        raise ValueError(f"policy must rank blocks, as TopK(0.1) does; got {policy!r}.")
    if np.ndim(tokens) != 1:
        raise ValueError(f"tokens must be integers [T], one prompt; got shape {np.shape(tokens)}.")
    prompt: Any = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    return model.check(prompt[None], None)[0][0]


@jax.jit
def _block_maps(model: Transformer, tokens: Int[Array, "T"], policy: RankingPolicy) -> BlockMaps:
    gate, count = model.prefill_gate, len(tokens)
    policy.check(model.config.num_layers, gate, "prefill")
    segments = [Segment(model.config.num_layers, policy.stacked(model.config.num_layers, model.config.num_heads))]
    block_size = policy.tokens_per_block(gate)
    read = functools.partial(_read_maps, policy.dense_first_layers(gate))
    true, scores, kept = model.spread(read, (P(None, TENSOR),) * 3, segments, tokens[None])
    last = jnp.minimum((jnp.arange(true.shape[-2]) + 1) * block_size, count) - 1
    return model.everywhere(BlockMaps(true, scores, kept, _density(kept, last // block_size + 1), last, block_size))


def _read_maps(
    dense_layers: int, model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "1 T"]
) -> tuple[Array, ...]:
    """True attention, scores and kept blocks of each layer and head."""
    heads, lengths = model.config.num_heads, jnp.full(1, tokens.shape[1], jnp.int32)

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        assert isinstance(layer.policy, RankingPolicy)
        context = layer.policy.prepare(model.prefill_context(layer, q, k, v, lengths))
        scored = attention_with_block_scores(context.q_rotated, context.k_rotated, v, block_size=context.block_size)
        assert scored.block_scores is not None
        scores = layer.policy.scorer.prefill_scores(context)
        visible = jnp.arange(scores.shape[-1])[None, None, None] < context.visible
        kept = layer.policy.select(scores, context).to_mask(scores.shape[-1]) | (visible & (layer.index < dense_layers))
        maps = scored.block_scores, _softmax(scores, visible), kept
        return scored.output, state, tuple(_by_head(x[0], heads) for x in maps)

    return model.scan(tokens, attend, segments=segments)[2]


def _by_head(maps: Array, heads: int) -> Array:
    """Maps `[H, Tb, Tb]`, repeated where heads share them."""
    return jnp.repeat(maps, heads // len(maps), axis=0)


@jax.jit
def _decode_block_maps(
    model: Transformer, tokens: Int[Array, "T"], policy: RankingPolicy, rows: Int[Array, "R"]
) -> BlockMaps:
    gate, oracle = model.decode_gate, Oracle()
    policy.check(model.config.num_layers, gate, "decode")
    segments = [Segment(model.config.num_layers, policy.stacked(model.config.num_layers, model.config.num_kv_heads))]
    dense_layers, block_size = policy.dense_first_layers(gate), policy.tokens_per_block(gate)

    def look(context: DecodeContext, of_layer: Policy) -> tuple:
        assert isinstance(of_layer, RankingPolicy)
        column = jnp.arange(context.num_key_blocks)[None, None]
        visible, completed = column <= context.current, column < context.current
        scores = of_layer.scorer.decode_scores(context)
        blocks = of_layer.select(scores, context)
        assert isinstance(blocks, BlockIndices)
        kept = (blocks.to_mask(context.num_key_blocks) | (context.layer < dense_layers)) & visible
        return tuple(
            x[0] for x in (_softmax(oracle.decode_scores(context), visible), _softmax(scores, completed), kept)
        )

    results = OF_ROWS, OF_LAYERS_AND_ROWS, OF_LISTS
    observed = model.spread(functools.partial(decode_rows, look, dense=True), results, segments, tokens[None])[2]
    true, scores, kept = (jnp.swapaxes(x[:, 0], 1, 2) for x in observed)  # [L, K, T, Sb]
    density = _density(kept, jnp.arange(len(tokens)) // block_size + 1)
    shown = true[:, :, rows], scores[:, :, rows], kept[:, :, rows]
    return model.everywhere(BlockMaps(*shown, density, rows, block_size))


def _softmax(scores: Float32[Array, "1 Hs R Sb"] | Float32[Array, "1 K Sb"], among: Bool[Array, "..."]) -> Array:
    """Over the last axis among some blocks; 0 elsewhere, and where there are none."""
    weights = jax.nn.softmax(jnp.where(among, scores, -jnp.inf))
    return jnp.where(among, weights, 0.0)


def _density(kept: Bool[Array, "L Hs R Sb"], visible: Int[Array, "R"]) -> Float32[Array, "L Hs"]:
    return (kept.sum((2, 3)) / visible.sum()).astype(jnp.float32)


def far_sighted_heads(maps: BlockMaps, count: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs with the most weight on blocks that sink+window drops, one per layer as far as possible."""
    column = np.arange(maps.true.shape[-1])
    far = (column > 0) & (column < maps.visible[:, None] - LOCAL)
    weight = (np.asarray(maps.true) * far).sum((2, 3))
    best = np.argsort(-weight, axis=1)
    order = [(layer, int(head)) for rank in best.T for layer, head in enumerate(rank)]
    layers, heads = weight.shape
    firsts = sorted(order[:layers], key=lambda at: -weight[at])
    rest = sorted(order[layers:], key=lambda at: -weight[at])
    return sorted((firsts + rest)[: min(count, layers * heads)])

"""Plots of a scorer's choices: true block map, the scorer's map and the kept blocks side by side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from pallas_kernels import attention_with_block_scores
from seer_jax.models.decoder import LayerContext, Transformer
from seer_jax.outputs import check_matplotlib
from seer_jax.selection.rules import RankingPolicy

FLOOR = 1e-3  # smallest weight that the colours tell from 0
LOCAL = 2  # blocks up to the diagonal that any window would keep


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMaps:
    """Attention of one prompt by blocks, for every layer and query head; 0 above the diagonal.

    Attributes:
      true: largest attention weight of each block, divided by the sum of its row: the target of the gate.
      scores: softmax of the scorer's scores.
      kept: the blocks that the policy keeps.
    """

    true: Float32[Array | np.ndarray, "*L H Tb Tb"]
    scores: Float32[Array | np.ndarray, "*L H Tb Tb"]
    kept: Bool[Array | np.ndarray, "*L H Tb Tb"]


def block_maps(model: Transformer, tokens: Int[Array | np.ndarray, "T"], policy: RankingPolicy) -> BlockMaps:
    """Maps of one prompt. Attention itself is dense, so that every layer reads what it would read in training.

    Args:
      model: with a prefill gate where the policy needs one.
      tokens: the prompt.
      policy: what ranks the blocks, and how many are kept; for example `TopK(0.1, dense_last_rows=0)`.

    Raises:
      ValueError: the tokens are no integers [T] of the model's vocabulary, or the policy is no ranking or does not fit the model.
    """
    if not isinstance(policy, RankingPolicy):
        raise ValueError(f"policy must rank blocks, as TopK(0.1) does; got {policy!r}.")
    if np.ndim(tokens) != 1:
        raise ValueError(f"tokens must be integers [T], one prompt; got shape {np.shape(tokens)}.")
    prompt: Any = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    return _block_maps(model, model.check(prompt[None], None)[0][0], policy)


@jax.jit
def _block_maps(model: Transformer, tokens: Int[Array, "T"], policy: RankingPolicy) -> BlockMaps:
    heads, gate = model.config.num_heads, model.prefill_gate
    policy.check(model.config.num_layers, gate)
    stacked, dense_layers = policy.stacked(model.config.num_layers, heads), policy.dense_first_layers(gate)
    lengths = jnp.full(1, len(tokens), jnp.int32)

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        of_layer = stacked.of_layer(layer.index)
        assert isinstance(of_layer, RankingPolicy)
        context = of_layer.prepare(model.prefill_context(layer, q, k, v, lengths))
        scored = attention_with_block_scores(context.q_rotated, context.k_rotated, v, block_size=context.block_size)
        assert scored.block_scores is not None
        scores = of_layer.scorer.prefill_scores(context)
        visible = jnp.arange(scores.shape[-1])[None, None, None] < context.visible
        kept = of_layer.select(scores, context).to_mask(scores.shape[-1]) | (visible & (layer.index < dense_layers))
        maps = scored.block_scores, jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), kept
        return scored.output, state, BlockMaps(*(_by_head(x[0], heads) for x in maps))

    return model.scan(tokens[None], attend)[2]


def _by_head(maps: Array, heads: int) -> Array:
    """Maps `[H, Tb, Tb]`, repeated where heads share them."""
    return jnp.repeat(maps, heads // len(maps), axis=0)


def far_sighted_heads(maps: BlockMaps, count: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs with the most weight on blocks that sink+window drops, one per layer as far as possible."""
    row, column = np.indices(maps.true.shape[-2:])
    far = (column > 0) & (column <= row - LOCAL)
    weight = (np.asarray(maps.true) * far).sum((2, 3))
    best = np.argsort(-weight, axis=1)
    order = [(layer, int(head)) for rank in best.T for layer, head in enumerate(rank)]
    layers, heads = weight.shape
    firsts = sorted(order[:layers], key=lambda at: -weight[at])
    rest = sorted(order[layers:], key=lambda at: -weight[at])
    return sorted((firsts + rest)[: min(count, layers * heads)])


def plot_block_maps(
    path: Path, maps: BlockMaps, heads: Sequence[tuple[int, int]], *, title: str = "", scorer: str = "gate"
) -> Path:
    """Writes a PNG: one row per (layer, head), columns for the true map, the scorer's map and the kept blocks.

    Args:
      path: file to write; its folder is made if need be.
      maps: of one prompt.
      heads: (layer, head) pairs.
      title: of the whole plot.
      scorer: its name in the heads of the columns.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the model has no such head.
    """
    layers, per_layer = maps.true.shape[:2]
    if bad := [at for at in heads if not (0 <= at[0] < layers and 0 <= at[1] < per_layer)]:
        raise ValueError(f"heads must be (layer, head) with layer < {layers} and head < {per_layer}; got {bad[0]}.")
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.1 * len(heads) + 0.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
    for line, (layer, head) in zip(axes, heads, strict=True):
        true, scores, kept = (np.asarray(x[layer, head]) for x in (maps.true, maps.scores, maps.kept))
        hidden = np.triu(np.ones(true.shape, bool), 1)
        for axis, values in zip(line, (true, scores), strict=False):
            shown = np.ma.masked_array(np.maximum(values, FLOOR), hidden)
            image = axis.imshow(shown, norm=LogNorm(FLOOR, 1), cmap="magma", interpolation="nearest")
        figure.colorbar(image, ax=line[:2], shrink=0.85, pad=0.01)
        line[2].imshow(np.ma.masked_array(kept, hidden), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_ylabel(f"layer {layer}, head {head}\nquery block")
    for axis, name in zip(axes[0], ("true block map", f"map of the {scorer}", "kept blocks"), strict=True):
        axis.set_title(name)
    for axis in axes[-1]:
        axis.set_xlabel("key block")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

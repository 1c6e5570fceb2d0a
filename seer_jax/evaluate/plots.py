"""Pictures of what a gate does: the true block map, the gate's map and the kept blocks side by side."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from pallas_kernels import attention_with_block_scores
from seer_jax.models.decoder import LayerContext, Transformer
from seer_jax.selection.rules import TopK

FLOOR = 1e-3  # the least weight that the colours tell from nothing
LOCAL = 2  # blocks up to the diagonal that any window would keep


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMaps:
    """Attention of one prompt by blocks, for every layer and query head; nothing above the diagonal.

    Attributes:
      true: largest attention weight of each block, rows divided by their sum: what the gate learns.
      gate: the gate's softmax.
      kept: the blocks that the gate keeps.
    """

    true: Float32[Array, "*L H Tb Tb"]
    gate: Float32[Array, "*L H Tb Tb"]
    kept: Bool[Array, "*L H Tb Tb"]


@functools.partial(jax.jit, static_argnames="density")
def block_maps(model: Transformer, tokens: Int[Array, "T"], *, density: float) -> BlockMaps:
    """Maps of one prompt. Attention itself is dense, so that every layer reads what it would read in training.

    Args:
      model: with a prefill gate.
      tokens: the prompt.
      density: share of the causal map that `kept` keeps, see `TopK`.
    """
    if model.prefill_gate is None:
        raise ValueError("Block maps show a prefill gate, and the model has none; load or train one.")
    policy = TopK(density, dense_last_rows=0)
    whole = jnp.full(1, len(tokens), jnp.int32)

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        context = model.prefill_context(layer, q, k, v, whole)
        scored = attention_with_block_scores(context.q_rotated, context.k_rotated, v, block_size=context.block_size)
        assert scored.block_scores is not None
        logits = policy.scorer.prefill_scores(context)
        visible = jnp.arange(logits.shape[-1]) < context.visible
        logits = jnp.where(visible, logits, -jnp.inf)
        kept = policy.select(logits, context).to_mask(logits.shape[-1])
        return scored.output, state, BlockMaps(scored.block_scores[0], jax.nn.softmax(logits)[0], kept[0])

    return model.scan(tokens[None], attend)[2]


def far_sighted_heads(maps: BlockMaps, count: int) -> list[tuple[int, int]]:
    """The (layer, head) pairs that look most at blocks which sink+window drops, at most one per layer first."""
    row, column = np.indices(maps.true.shape[-2:])
    far = (column > 0) & (column <= row - LOCAL)
    weight = (np.asarray(maps.true) * far).sum((2, 3))
    best = np.argsort(-weight, axis=1)
    order = [(layer, int(head)) for rank in best.T for layer, head in enumerate(rank)]
    layers, heads = weight.shape
    firsts = sorted(order[:layers], key=lambda at: -weight[at])
    rest = sorted(order[layers:], key=lambda at: -weight[at])
    return sorted((firsts + rest)[: min(count, layers * heads)])


def plot_block_maps(path: Path, maps: BlockMaps, heads: Sequence[tuple[int, int]], *, title: str = "") -> Path:
    """Writes a PNG: one row per (layer, head), columns for the true map, the gate's map and the kept blocks.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: a head that the model does not have.
    """
    layers, per_layer = maps.true.shape[:2]
    if bad := [at for at in heads if not (0 <= at[0] < layers and 0 <= at[1] < per_layer)]:
        raise ValueError(f"Heads are (layer, head) with layer < {layers} and head < {per_layer}; got {bad[0]}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'seer-jax[plot]'.") from error
    figure = Figure(figsize=(9.5, 3.1 * len(heads) + 0.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
    for line, (layer, head) in zip(axes, heads, strict=True):
        true, gate, kept = (np.asarray(x[layer, head]) for x in (maps.true, maps.gate, maps.kept))
        hidden = np.triu(np.ones(true.shape, bool), 1)
        for axis, values in zip(line, (true, gate), strict=False):
            picture = np.ma.masked_array(np.maximum(values, FLOOR), hidden)
            image = axis.imshow(picture, norm=LogNorm(FLOOR, 1), cmap="magma", interpolation="nearest")
        figure.colorbar(image, ax=line[:2], shrink=0.85, pad=0.01)
        line[2].imshow(np.ma.masked_array(kept, hidden), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_ylabel(f"layer {layer}, head {head}\nquery block")
    for axis, name in zip(axes[0], ("true block map", "gate's map", "blocks the gate keeps"), strict=True):
        axis.set_title(name)
    for axis in axes[-1]:
        axis.set_xlabel("key block")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

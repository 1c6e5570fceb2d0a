"""What rules drop at each of their levels, and what that costs: prefix sums over the blocks of a row, from the lowest score up.

Threshold and cumulative mass keep the best blocks of a row by one ranking, so what either drops at any level is a prefix of one order.

Letters: X lists of a block row, R rows, n tokens that share a row, G query heads that share a list, Sb key blocks, N levels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from seer_jax.selection.rules import CumulativeMass, Threshold

LEAST_KEPT_MASS = 1e-3  # what is left is not divided by less
_STEPS = 79


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels of a rule that are compared.

    Attributes:
      rule: whose value they are.
      values: N levels, from the one that keeps every block to the sparsest.
    """

    rule: type[Threshold] | type[CumulativeMass]
    values: tuple[float, ...]

    def between(self, place: float) -> float:
        """The value between levels, at a fractional number of at least 1; levels are evenly spaced in the logarithm of what they drop."""
        at = np.array(self.values[1:])
        logs = np.log(at if self.rule is Threshold else 1 - at)
        dropped = float(np.exp(np.interp(place - 1, np.arange(len(logs)), logs)))
        return dropped if self.rule is Threshold else 1 - dropped


GRIDS = {
    grid.rule.name: grid
    for grid in (
        Grid(Threshold, (0.0, *np.geomspace(1e-6, 0.5, _STEPS).tolist())),
        Grid(CumulativeMass, (1.0, *(1 - np.geomspace(1e-4, 0.95, _STEPS)).tolist())),
    )
}


class Curves(NamedTuple):
    """What a rule keeps and loses at each level, for each list.

    Fields:
      density: share of the visible blocks that is kept.
      missed: share of the attention mass that lies in dropped blocks, mean over tokens and the list's heads.
      loss: estimate of how much the loss of the text rises where this list alone is sparse, nats, sum over tokens, see `rise`.
      blind: the same, blind to the directions of values and gradients: half the mean square of the change if they were random.
    """

    density: Float32[Array | np.ndarray, "*lists N"]
    missed: Float32[Array | np.ndarray, "*lists N"]
    loss: Float32[Array | np.ndarray, "*lists N"]
    blind: Float32[Array | np.ndarray, "*lists N"]

    def normalised(self, visible: float, tokens: int) -> "Curves":
        """Of sums over rows that see `visible` blocks in all, and over `tokens` tokens."""
        return self._replace(density=self.density / visible, missed=self.missed / tokens)

    def cautious(self, caution: float, density: float) -> "Curves":
        """With a loss that is drawn towards the estimate which is blind to directions.

        That one is coarser, but says more where windows are few, as a direction counts for one text alone. Both terms are relative to
        their sums at the common level that is nearest to a density.

        Args:
          caution: weight of `blind` beside the loss, at least 0.
          density: mean over layers and heads.
        """
        near = int(np.abs(np.asarray(self.density).mean((0, 1)) - density).argmin())
        loss, blind = (x / max(float(x[..., near].sum()), 1e-30) for x in (self.loss, self.blind))
        return self._replace(loss=loss + caution * blind)


class Rows(NamedTuple):
    """What rules look at.

    Fields:
      scores: before softmax.
      visible: blocks that attention would read.
      candidates: blocks whose scores are compared.
      keep: blocks that every level keeps.
    """

    scores: Float32[Array, "X R Sb"]
    visible: Bool[Array, "1 R Sb"]
    candidates: Bool[Array, "1 R Sb"]
    keep: Bool[Array, "X R Sb"]


class Tokens(NamedTuple):
    """What tokens lose with their blocks.

    Fields:
      mass: of each block, by token and head; a token's masses sum to 1.
      effect: first-order change of the loss where a block is dropped, before what is left is divided by 1 - missed mass.
      scale: size of the first-order change by values of random directions: norm of the gradient times root mean square of the values.
    """

    mass: Float32[Array, "X R n G Sb"]
    effect: Float32[Array, "X R n G Sb"]
    scale: Float32[Array, "X R n G"]


def drop_curves(rows: Rows, tokens: "Tokens", grid: Grid) -> Curves:
    """The curves of a rule over some rows, as sums over rows and tokens, see `Curves.normalised`."""
    drops = _drops(rows, grid)
    order = jnp.argsort(jnp.where(drops.droppable, drops.probability, jnp.inf), axis=-1)
    counts = drops.counts[:, :, None, None]

    def dropped(x: jax.Array) -> jax.Array:
        """Sum over the dropped blocks at each level."""
        sums = jnp.cumsum(jnp.take_along_axis(x, order[:, :, None, None], axis=-1), axis=-1)
        return jnp.take_along_axis(jnp.pad(sums, [(0, 0)] * 4 + [(1, 0)]), counts, axis=-1)

    missed = jnp.clip(dropped(tokens.mass), 0, 1)
    left = jnp.maximum(1 - missed, LEAST_KEPT_MASS)
    change = (dropped(tokens.effect) / left).sum(3)  # a list's heads lose their blocks together
    blind = jnp.square(tokens.scale[..., None] * missed / left) / 2
    kept = (rows.visible.sum(-1)[..., None] - drops.counts).astype(jnp.float32)
    return Curves(kept.sum(1), missed.sum((1, 2)).mean(1), rise(change).sum((1, 2)), blind.sum((1, 2, 3)))


def rise(change: Float32[Array, "*any"]) -> Float32[Array, "*any"]:
    """Expected rise of the loss from the first-order change x that a perturbed output makes: x^2 / 2, beyond one nat |x| - 1/2.

    Where the model predicts well, the changes of single tokens have either sign and mean 0, and the loss rises by the divergence between
    the predictions before and after: half the mean square of x, to second order (Fisher information). That order overestimates large
    changes, by which the loss can rise no faster than linearly.
    """
    size = jnp.abs(change)
    return jnp.where(size < 1, size * size / 2, size - 0.5)


class _Drops(NamedTuple):
    """How many blocks each level drops from each row: those with the lowest probability among `droppable`."""

    probability: Float32[Array, "X R Sb"]
    droppable: Bool[Array, "X R Sb"]
    counts: Int32[Array, "X R N"]


def _drops(rows: Rows, grid: Grid) -> _Drops:
    allowed = rows.candidates & (rows.scores > -jnp.inf)
    best = jnp.where(allowed, rows.scores, -jnp.inf).max(-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(rows.scores - best), 0)
    probability = weights / jnp.where(allowed.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
    droppable = rows.visible & ~rows.keep
    better = _better_mass(probability) if grid.rule is CumulativeMass else probability
    values = jnp.asarray(grid.values, jnp.float32)[None, None, :, None]
    allowed, better, dropping = (x[..., None, :] for x in (allowed, better, droppable))
    if grid.rule is CumulativeMass:
        dropping = dropping & (~allowed | ((better >= values) & (values < 1)))
    else:
        dropping = dropping & ~(better > values)
    counts = dropping.sum(-1, dtype=jnp.int32)
    return _Drops(probability, droppable, counts)


def _better_mass(probability: Float32[Array, "X R Sb"]) -> Float32[Array, "X R Sb"]:
    """Total probability of the better blocks of its row, for each block; of equal ones the lower number is the better."""
    order = jnp.argsort(-probability, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probability, order, axis=-1)
    return jnp.take_along_axis(jnp.cumsum(ranked, axis=-1) - ranked, jnp.argsort(order, axis=-1), axis=-1)

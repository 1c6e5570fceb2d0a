"""Which level each layer and head gets: the least total rise of the loss at a mean density, by a Lagrange multiplier."""

import math

import numpy as np
from jaxtyping import Float, Int

from seer_jax.calibrate.levels import Curves, Grid

_STEPS = 100  # of the bisection, of the multiplier's logarithm


def cheapest_levels(curves: Curves, density: float, *, dense_layers: int = 0) -> Int[np.ndarray, "L heads"]:
    """The level of each layer and head that minimises the sum of `curves.loss` where the mean density is at most `density`.

    Each list takes the level with the least loss + m * density. The multiplier m, the same for all, is bisected; of the lists that change
    at it, as many as fit are kept at the denser level.

    Args:
      curves: `[L, heads, N]`; level 0 keeps every block.
      density: mean over layers and heads.
      dense_layers: the first layers, which keep every block.

    Raises:
      ValueError: no choice of levels is so sparse.
    """
    loss, share = _fixed(curves, dense_layers)
    check_reachable(curves, density, dense_layers=dense_layers)

    def at(multiplier: float) -> Int[np.ndarray, "L heads"]:
        with np.errstate(invalid="ignore"):
            return np.argmin(loss + multiplier * share, axis=-1)

    def shares(levels: np.ndarray) -> Float[np.ndarray, "L heads"]:
        return np.take_along_axis(share, levels[..., None], -1)[..., 0]

    low, high = -80.0, 80.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(at(np.exp(middle))).mean() > density else (low, middle)
    dense, sparse = at(np.exp(low)), at(np.exp(high))
    added = np.maximum(shares(dense) - shares(sparse), 0).reshape(-1)
    fits = np.cumsum(added) <= density * added.size - shares(sparse).sum()
    return np.where(fits.reshape(sparse.shape), dense, sparse)


def check_reachable(curves: Curves, density: float, *, dense_layers: int = 0) -> None:
    """Raises ValueError where the blocks that every level keeps are more than a density."""
    _, share = _fixed(curves, dense_layers)
    if density < (least := float(share.min(-1).mean())):
        raise unreachable(density, least)


def unreachable(density: float, least: float, where: str = "") -> ValueError:
    """The error of a density below the least one that a rule's highest level keeps."""
    least = math.ceil(1000 * least) / 1000  # a density that is raised to what the message says is reached
    return ValueError(
        f"density must be at least {least:.3f}{where}, what the highest level keeps at this length, each row's own block among it; "
        f"got {density}. Raise it, or calibrate on longer windows."
    )


def at_levels(
    values: Float[np.ndarray, "L heads N"], levels: Int[np.ndarray, "L heads"], *, dense_layers: int, dense: float
) -> float:
    """Mean over layers and heads of one of the curves at given levels; `dense` in the first layers, which keep every block."""
    chosen = np.take_along_axis(values, levels[..., None], -1)[..., 0].astype(np.float64)
    chosen[:dense_layers] = dense
    return float(chosen.mean())


def one_level(curves: Curves, grid: Grid, density: float, *, dense_layers: int = 0) -> float:
    """The value of a rule that has this mean density where all layers and heads share it."""
    _, share = _fixed(curves, dense_layers)
    mean = share.mean((0, 1))[1:]
    return grid.between(1 + float(np.interp(-density, -mean, np.arange(len(mean)))))


def _fixed(curves: Curves, dense_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and density where the first layers keep every block."""
    loss, share = (np.array(x, np.float64) for x in (curves.loss, curves.density))
    loss[:dense_layers, :, 1:], share[:dense_layers] = np.inf, 1
    return loss, share

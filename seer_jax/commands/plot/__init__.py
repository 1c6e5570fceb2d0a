"""Draw evaluations, benchmarks and block maps: plot loss|speed|density|maps."""

from seer_jax.commands.plot.draw import run

__all__ = ["run"]

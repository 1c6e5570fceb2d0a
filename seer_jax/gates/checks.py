"""What gates are made of and called with, checked: a message says what must hold, what came, and what to do."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_kernels.checks import check_array
from seer_jax.models.config import ModelConfig


def check_made_of(gate: type, kind: type, config: Any, model: Any, rngs: Any) -> None:
    """Raises ValueError unless a gate can be made of these."""
    if not isinstance(config, kind):
        raise ValueError(f"config of a {gate.__name__} must be a {kind.__name__}; got {config!r}.")
    if not isinstance(model, ModelConfig):
        raise ValueError(
            f"model of a {gate.__name__} must be a ModelConfig; got {type(model).__name__}. Pass `model.config`, or let "
            "`model.add_gate(config, rngs=...)` make and attach it."
        )
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs of a {gate.__name__} must be nnx.Rngs; got {type(rngs).__name__}. Write nnx.Rngs(0).")


def check_vectors(name: str, x: Any, heads: int, dim: int, positions: Any, weight: tuple[int, ...]) -> None:
    """Raises ValueError unless these are queries or keys for the gate of one layer, with the positions of their tokens.

    Args:
      name: of x, for messages.
      x: vectors [B, T, heads, dim] of the model.
      positions: [B, T] or [1, T].
      weight: shape of a weight of the gate: (heads, P, C), and before these the layers where it has those of all.
    """
    if len(weight) > 3:
        raise ValueError(
            f"gate: weights must be those of one layer; got those of all {weight[0]}. Take "
            "seer_jax.models.layers.layer_view(gate, layer)."
        )
    check_array("gate", name, x)
    check_array("gate", "positions", positions)
    if x.ndim != 4 or x.shape[2:] != (heads, dim) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"gate: {name} must be floats [B, T, {heads}, {dim}], as the model's; got {x.dtype} {x.shape}."
        )
    shapes = (x.shape[:2], (1, x.shape[1]))
    if positions.shape not in shapes or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"gate: positions must be integers, one of {shapes}; got {positions.dtype} {positions.shape}.")

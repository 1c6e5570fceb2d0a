"""A gate of either kind from its configuration."""

from flax import nnx

from seer_jax.gates.configs import DecodeGateConfig, GateConfig, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import ModelConfig

Gate = PrefillGate | DecodeGate


def make_gate(config: GateConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> Gate:
    """A fresh, untrained gate of the kind that the configuration describes. Raises ValueError where it describes none."""
    if isinstance(config, PrefillGateConfig):
        return PrefillGate(config, model, rngs=rngs)
    if isinstance(config, DecodeGateConfig):
        return DecodeGate(config, model, rngs=rngs)
    raise ValueError(f"config must be a PrefillGateConfig or a DecodeGateConfig; got {config!r}.")

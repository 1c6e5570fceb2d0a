"""A gate of either kind from its configuration."""

from flax import nnx

from seer_jax.gates.configs import GateConfig, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.gates.prefill import PrefillGate
from seer_jax.models.config import ModelConfig

Gate = PrefillGate | DecodeGate


def make_gate(config: GateConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> Gate:
    """A fresh, untrained gate of the kind that the configuration describes."""
    if isinstance(config, PrefillGateConfig):
        return PrefillGate(config, model, rngs=rngs)
    return DecodeGate(config, model, rngs=rngs)

"""A tiny random model and settings of runs that take seconds."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, TrainedGates
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.train.config import DistillConfig, FinetuneConfig, OptimizerConfig

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
)
BLOCK = 16
LENGTH = 8 * BLOCK
PREFILL = PrefillGateConfig(block_size=BLOCK, gate_dim=16)
DECODE = DecodeGateConfig(block_size=BLOCK, gate_dim=16)


def make_model(
    *, layers: int = 2, gates: tuple = (), dtype: jnp.dtype = jnp.float32, model: ModelConfig = CONFIG
) -> Transformer:
    """Random weights, drawn by NumPy, which compiles nothing; sharp attention, so that there is something to learn."""
    config, rng = dataclasses.replace(model, num_layers=layers), np.random.default_rng(0)

    def make() -> Transformer:
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
        for gate in gates:
            model.add_gate(gate, rngs=nnx.Rngs(0))
        return model

    def weight(path: tuple, like: nnx.Variable) -> jnp.ndarray:
        if "norm" in path[-1]:
            return jnp.full(like.shape, 4 if path[-1] == "q_norm" else 1, like.dtype)
        return jnp.asarray(
            rng.normal(size=like.shape) * like.shape[-2 if "gate" in path[0] else -1] ** -0.5, like.dtype
        )

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, nnx.map_state(weight, state))


def make_rows(rows: int = 12, length: int = LENGTH) -> np.ndarray:
    """Rows in which each token is likelier to follow some than others."""
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 3, 7], size=(rows, length))
    return np.cumsum(steps, axis=1) % CONFIG.vocab_size


def distill_config(**changes) -> DistillConfig:
    """A short run."""
    config = DistillConfig(
        kind=TrainedGates.BOTH,
        prefill=PREFILL,
        decode=DECODE,
        sequence_length=LENGTH,
        batch_size=4,
        micro_batch_size=4,
        steps=12,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        tensorboard=False,
    )
    return dataclasses.replace(config, **changes)


def finetune_config(**changes) -> FinetuneConfig:
    """A short run."""
    optimizer = OptimizerConfig(warmup_steps=2)
    config = FinetuneConfig(
        sequence_length=LENGTH, batch_size=4, micro_batch_size=4, steps=12, optimizer=optimizer, tensorboard=False
    )
    return dataclasses.replace(config, **changes)

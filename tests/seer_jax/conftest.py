"""Tiny random models shared by the tests of this folder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.typing import DTypeLike

from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference import memory
from seer_jax.models.config import ModelConfig, RopeConfig, RopeKind
from seer_jax.models.decoder import Transformer

LLAMA = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=RopeConfig(theta=1e4, kind=RopeKind.LLAMA3, factor=8, original_max_position=64),
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tie_word_embeddings=True, rope=RopeConfig(theta=1e4))
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, num_kv_heads=4, rope=RopeConfig(theta=1e4))


def tiny_model(
    config: ModelConfig = LLAMA,
    *,
    gates: bool = True,
    block_size: int = 16,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Transformer:
    """A model with random weights and, if asked for, both gates. Each call gives one of its own."""
    return nnx.clone(_tiny_model(config, gates, block_size, seed, jnp.dtype(dtype)))


@functools.cache
def _tiny_model(config: ModelConfig, gates: bool, block_size: int, seed: int, dtype: jnp.dtype) -> Transformer:
    """Weights take seconds to draw, most of them for compiling. Arrays, also where the caller is traced."""
    with jax.ensure_compile_time_eval():
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(seed))
        # Random weights attend almost evenly; sharper queries make it matter which blocks are kept.
        model.layers.self_attn.q_proj.weight[...] *= 4
        if gates:
            model.add_gate(PrefillGateConfig(block_size=block_size, gate_dim=config.head_dim), rngs=nnx.Rngs(seed + 1))
            model.add_gate(DecodeGateConfig(block_size=block_size, gate_dim=config.head_dim), rngs=nnx.Rngs(seed + 2))
        return model


@pytest.fixture(scope="module", autouse=True)
def products(exact_products: None) -> None:
    """Float32 base models are held to float32 bounds."""


@pytest.fixture(autouse=True)
def no_device_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs: plans are made of shapes, which the type checker of the tests would refuse in place of arrays."""
    monkeypatch.setattr(memory, "device_memory", lambda device: None)


@pytest.fixture(scope="session", params=[QWEN2, QWEN3], ids=lambda c: c.family)
def model(request: pytest.FixtureRequest) -> Transformer:
    """One tiny model of each other family, with both gates; `tiny_model()` is a Llama."""
    return tiny_model(request.param)

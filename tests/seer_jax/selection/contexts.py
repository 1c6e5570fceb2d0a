"""Contexts of one layer with random contents, and policies whose lists are noted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import BlockIndices
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.gates.make import make_gate
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig, RopeConfig
from seer_jax.models.rope import rotate
from seer_jax.selection.context import Context, DecodeContext, PrefillContext
from seer_jax.selection.policies import Policy

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 3, 4, 2, 8, 16
MODEL = ModelConfig(
    family="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    rope=RopeConfig(theta=100.0),
)


def _random(key: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(key).standard_normal(shape), jnp.float32)


def _gate(config: PrefillGateConfig | DecodeGateConfig) -> Any:
    """The weights of one layer."""
    gate = make_gate(config, MODEL, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: x[0], gate)


def prefill_context(tokens: int, lengths: tuple[int, ...], layer: Any = 1) -> PrefillContext:
    """A prompt of ragged rows in a layer with a gate; queries are sharp, so that it matters which blocks are kept."""
    batch = len(lengths)
    q, k, v = (_random(i, batch, tokens, heads, DIM) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    q_rotated, k_rotated = rotate(4 * q, k, jnp.arange(tokens)[None], MODEL.rope)
    return PrefillContext(
        q=4 * q,
        k=k,
        q_rotated=q_rotated,
        k_rotated=k_rotated,
        v=v,
        lengths=jnp.asarray(lengths, jnp.int32),
        layer=jnp.int32(layer),
        block_size=BLOCK,
        gate=_gate(PrefillGateConfig(BLOCK, DIM)),
    )


def decode_context(capacity: int, positions: tuple[int, ...], layer: Any = 1) -> DecodeContext:
    """A token of each row, at the given positions of a cache."""
    batch, gate = len(positions), _gate(DecodeGateConfig(BLOCK, DIM))
    prompt = prefill_context(capacity, positions)
    assert prompt.k is not None
    cache = Cache.create(MODEL, batch, capacity, jnp.float32, decode_gate=gate.config)
    cache = cache.fill(jnp.int32(layer), prompt.k_rotated, prompt.v)
    cache = cache.fill_decode_gate(jnp.int32(layer), gate, prompt.k, prompt.lengths).with_lengths(prompt.lengths)
    q, index = 4 * _random(9, batch, 1, HEADS, DIM), jnp.int32(layer)
    q_rotated, _ = rotate(q, prompt.k[:, :1], prompt.lengths[:, None], MODEL.rope)
    return DecodeContext(q=q, q_rotated=q_rotated, cache=cache.view(index), layer=index, block_size=BLOCK, gate=gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded(Policy):
    """A policy whose lists are noted as masks, beside the number of their first row."""

    policy: Policy
    noted: list[tuple[int, np.ndarray]] = dataclasses.field(
        default_factory=list, metadata=dict(static=True), hash=False
    )

    def blocks(self, context: Context) -> BlockIndices | None:
        blocks = self.policy.blocks(context)
        assert blocks is not None and isinstance(context, PrefillContext)
        mask = blocks.to_mask(context.num_key_blocks)
        jax.debug.callback(lambda row, mask: self.noted.append((int(row), np.asarray(mask))), context.first_row, mask)
        return blocks

    def prepare(self, context: PrefillContext) -> PrefillContext:
        return self.policy.prepare(context)

    def masks(self) -> np.ndarray:
        """[B, Hs, Tb, Sb] of all rows in their order."""
        jax.effects_barrier()
        return np.concatenate([mask for _, mask in sorted(self.noted, key=lambda x: x[0])], axis=2)

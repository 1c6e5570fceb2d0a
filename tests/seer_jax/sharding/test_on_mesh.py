"""Models spread over a mesh of four CPU devices compute what one device computes, and exchange no more than they must."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seer_jax import Threshold, parse_policy
from seer_jax.models.decoder import LayerContext, Segment, Transformer
from seer_jax.selection.policies import Policy
from seer_jax.selection.scorers import SCORERS
from seer_jax.sharding import make_mesh, place
from seer_jax.sharding.on_mesh import OF_VOCABULARY
from seer_jax.sharding.table import ROWS, TENSOR
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

MESHES = ["data=2,tensor=2", "fsdp=4", "tensor=4"]
BIASED = dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True)
BATCH, WIDTH = 4, 112
TOKENS = np.random.default_rng(0).integers(0, 63, (BATCH, WIDTH)).astype(np.int32)
LENGTHS = np.array([112, 49, 64, 7], np.int32)
# A value for each layer and head, so that heads on the wrong device show.
PER_HEAD = Threshold(np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4), dense_last_rows=0)
PER_KV_HEAD = Threshold(np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(2, 2))


@functools.cache
def alone() -> Transformer:
    """A model on one device, whose biases are not zeros."""
    model = tiny_model(BIASED)
    for layer in (model.layers.self_attn, model.layers.mlp):
        for name, linear in vars(layer).items():
            if getattr(linear, "bias", None) is not None:
                shape = linear.bias[...].shape
                linear.bias[...] = 0.1 * jax.random.normal(jax.random.key(len(name) + shape[1]), shape)
    return model


@functools.cache
def on(text: str) -> Transformer:
    """The same model on a mesh."""
    if text == "tensor=4":
        with pytest.warns(
            RuntimeWarning, match="4 devices of the mesh axis tensor share 2 key/value heads: 2 devices each hold"
        ):
            return place(alone(), make_mesh(text))
    return place(alone(), make_mesh(text))


def masks_and_logits(model: Transformer, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that every head of every layer keeps, and the logits. A pass of one's own over the layers."""

    def run(model: Transformer, segments: Sequence[Segment], tokens: jax.Array, lengths: jax.Array) -> tuple:
        def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
            from seer_jax.models.attention import prefill_attention

            context = layer.policy.prepare(model.prefill_context(layer, q, k, v, lengths))
            blocks = layer.policy.blocks(context)
            assert blocks is not None
            mask = blocks.to_mask(context.num_key_blocks)
            mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1)
            return prefill_attention(layer.policy, context)[0], state, mask

        hidden, _, masks = model.scan(tokens, attend, segments=segments)
        return masks, model.logits(hidden)

    segments = model.segments(policy, model.prefill_gate, model.config.num_heads, "prefill")
    results = (P(None, ROWS, TENSOR), OF_VOCABULARY)
    arrays = jnp.asarray(TOKENS), jnp.asarray(LENGTHS)
    masks, logits = jax.jit(lambda model: model.spread(run, results, segments, *arrays))(model)
    return np.asarray(masks), np.asarray(logits)


def assert_same_lists(text: str, policy: Policy) -> None:
    (masks, logits), (expected, of_one) = masks_and_logits(on(text), policy), on_one_device(str(policy))
    np.testing.assert_array_equal(masks, expected)
    counted = np.arange(WIDTH) < LENGTHS[:, None]
    np.testing.assert_allclose(logits[counted], of_one[counted], atol=1e-5, rtol=0)


POLICIES: dict[str, Policy] = {}


@functools.cache
def on_one_device(policy: str) -> tuple[np.ndarray, np.ndarray]:
    return masks_and_logits(alone(), POLICIES[policy])


def known(policy: Policy) -> Policy:
    POLICIES[str(policy)] = policy
    return policy


MASK = np.random.default_rng(1).random((2, BATCH, 4, 7, 7)) < 0.5


@pytest.mark.parametrize("text", MESHES)
def test_lists_and_logits_are_those_of_one_device(text: str):
    assert_same_lists(text, known(PER_HEAD))


@pytest.mark.parametrize("name", [s.name for s in SCORERS.values() if "prefill" in s.phases() and s.name != "gate"])
def test_scorers_see_whole_groups_of_heads(name: str):
    assert_same_lists("tensor=4", known(parse_policy(f"topk:0.5:{name}")))

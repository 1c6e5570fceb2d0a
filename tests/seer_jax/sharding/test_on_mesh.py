"""Models spread over a mesh of four or two devices compute what one device computes, and exchange no more than they must."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from seer_jax import Given, Sample, Threshold, TokenBudget, TopK, generate, parse_policy, stream
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction
from seer_jax.models.attention import prefill_attention
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.selection.policies import Policy
from seer_jax.selection.scorers import SCORERS
from seer_jax.sharding import make_mesh, place
from seer_jax.sharding.on_mesh import OF_VOCABULARY
from seer_jax.sharding.table import ROWS, TENSOR
from tests.seer_jax.conftest import LLAMA, tiny_model
from tests.seer_jax.sharding.spread import (
    BATCH,
    LENGTHS,
    MESHES,
    OF_TWO,
    TOKENS,
    WIDTH,
    alone,
    collectives,
    on,
    unordered,
)

pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly")]

FIRST_FAST = [MESHES[0], *(pytest.param(text, marks=pytest.mark.slow) for text in MESHES[1:])]
# A value for each layer and head, so that heads on the wrong device show.
PER_HEAD = Threshold(np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4), dense_last_rows=0)
PER_KV_HEAD = Threshold(np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(2, 2))


def masks_and_logits(model: Transformer, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that every head of every layer keeps, and the logits. A pass of one's own over the layers."""

    def run(model: Transformer, segments: Sequence[Segment], tokens: jax.Array, lengths: jax.Array) -> tuple:
        def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
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


@pytest.mark.parametrize("text", [*FIRST_FAST, *OF_TWO])
def test_lists_and_logits_are_those_of_one_device(text: str):
    assert_same_lists(text, known(PER_HEAD))


PREFILL_SCORERS = [name for name, kind in SCORERS.items() if "prefill" in kind.phases() and name != "gate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFILL_SCORERS)
def test_scorers_rank_as_on_one_device(name: str):
    assert_same_lists("tensor=4", known(parse_policy(f"topk:0.5:{name}")))


def test_masks_are_split_with_rows_and_heads():
    mask = np.random.default_rng(1).random((2, BATCH, 4, 7, 7)) < 0.5
    assert_same_lists("data=2,tensor=2", known(Given(jnp.asarray(mask), block_size=16)))


def prefill_and_decode(model: Transformer) -> tuple:
    """Logits after the prompts and after one further token, shares of kept blocks, and the cache."""
    first, cache, kept = model.prefill(TOKENS, LENGTHS, model.make_cache(BATCH, 128), sparsity=PER_HEAD)
    # No number is NaN: these tokens come from the first pass, as generated ones do.
    tokens = jnp.arange(BATCH) + jnp.isnan(first).any(1) + jnp.isnan(kept).any(0)
    second, cache, kept_then = model.decode(tokens, cache, sparsity=PER_KV_HEAD)
    return first, second, kept, kept_then, cache


@functools.cache
def compiled(text: str) -> jax.stages.Compiled:
    """The program of `prefill_and_decode` on a mesh."""
    return jax.jit(prefill_and_decode).lower(on(text)).compile()


@functools.cache
def decoded_alone() -> tuple:
    return jax.jit(prefill_and_decode)(alone())


@pytest.mark.slow
@pytest.mark.parametrize("text", [*MESHES, *OF_TWO])
def test_prefill_and_decoding_are_those_of_one_device(text: str):
    got, expected = compiled(text)(on(text)), decoded_alone()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5, rtol=0)
    kept = np.asarray(got[3])
    assert kept.min() < 1, "the new token keeps every block: the test says nothing"
    mesh = make_mesh(text).shape
    batch, heads = BATCH // (mesh["data"] * mesh["fsdp"]), max(1, 2 // mesh["tensor"])
    keys, _ = got[-1].token_arrays
    assert keys.addressable_shards[0].data.shape == (2, batch, 128, heads, 16)


@pytest.mark.parametrize("text", FIRST_FAST)
def test_devices_exchange_two_sums_in_each_layer_and_no_queries_keys_or_values(text: str):
    found = collectives(compiled(text))
    assert not unordered(compiled(text))
    if text == "fsdp=4":
        # In either pass the weights of a layer; the embedding and, but for CPUs, the head once. Queries, keys, values and cache have more axes.
        heads = 1 if jax.default_backend() == "gpu" else 2
        assert found.keys() == {"all-gather"} and len(found["all-gather"]) == 2 * 7 + 1 + heads, found
        assert all(shape.count(",") == 1 for shape in found["all-gather"]), found
        return
    rows = BATCH // make_mesh(text).shape["data"]
    # In either pass two in a layer, and besides these the embedding and the shares of kept blocks.
    sums = [f"f32[{rows},{tokens},32]" for tokens in (WIDTH, 1)] * 3 + [f"f32[2,{rows}]"] * 2
    # Logits; where devices share a key/value head, the new token's queries of its group.
    gathers = [f"f32[{rows},64]"] * 2 + [f"f32[{rows},1,2,16]"] * (text == "tensor=4")
    assert {kind: sorted(shapes) for kind, shapes in found.items()} == {
        "all-reduce": sorted(sums),
        "all-gather": sorted(gathers),
    }


REQUEST: dict[str, Any] = dict(
    max_new_tokens=9, prefill=PER_HEAD, decode=TokenBudget(48), sampling=Sample(1.0, top_k=20), key=jax.random.key(3), eos=()
)  # fmt: skip


@functools.cache
def generated_alone() -> Any:
    return generate(alone(), TOKENS, LENGTHS, **REQUEST)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*MESHES, *OF_TWO])
def test_generation_is_that_of_one_device(text: str):
    got, expected = generate(on(text), TOKENS, LENGTHS, **REQUEST), generated_alone()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-6, rtol=0)
    assert got.tokens.is_fully_replicated


@pytest.mark.slow
def test_streams_and_batches_that_devices_do_not_divide():
    """Three rows for two devices along data: each computes all of them."""
    rows = slice(0, 3)
    request: dict[str, Any] = REQUEST | dict(
        key=jax.vmap(functools.partial(jax.random.fold_in, REQUEST["key"]))(jnp.arange(3))
    )
    parts = list(stream(on("data=2,tensor=2"), TOKENS[rows], LENGTHS[rows], chunk=5, **request))
    rows_made = [[token for part in parts for token in part[i]] for i in range(3)]
    assert rows_made == generated_alone().rows()[rows] and len(parts) == 3


def test_a_model_without_a_mesh_has_a_program_without_one():
    program = str(jax.make_jaxpr(prefill_and_decode)(alone()))
    assert not re.search("shard_map|psum|all_gather|sharding_constraint|axis_index", program)
    assert "shard_map" in str(jax.make_jaxpr(prefill_and_decode)(on("fsdp=4")))


@pytest.mark.slow
def test_a_mesh_of_one_device_exchanges_nothing():
    model = place(alone(), make_mesh("tensor=1"))
    program = jax.jit(prefill_and_decode).lower(model).compile()
    assert not collectives(program)
    for ours, theirs in zip(jax.tree.leaves(program(model)), jax.tree.leaves(decoded_alone()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [QueryReduction.AVG_PROJ, QueryReduction.HEADS])
def test_other_gates_see_whole_groups_of_heads(reduction: QueryReduction):
    """Gates with several queries and keys per block, and two projections, on devices that share key/value heads."""
    model = tiny_model(LLAMA, gates=False)
    model.add_gate(PrefillGateConfig(16, 16, force_double=True, q_pool_size=8, k_pool_size=4), rngs=nnx.Rngs(1))
    model.add_gate(DecodeGateConfig(16, 16, query_reduction=reduction, k_pool_size=8), rngs=nnx.Rngs(2))
    request: dict[str, Any] = dict(max_new_tokens=9, prefill=TopK(0.5), decode=TokenBudget(48), eos=())
    with pytest.warns(RuntimeWarning, match="share 2 key/value heads"):
        spread = place(model, make_mesh("tensor=4"))
    got, expected = (generate(m, TOKENS, LENGTHS, **request) for m in (spread, model))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*MESHES, *OF_TWO])
def test_gradients_are_those_of_one_device(text: str):
    for ours, theirs in zip(gradients(on(text)), gradients(alone()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def gradients(model: Transformer) -> list[np.ndarray]:
    """Of a loss in all weights."""
    weights, structure = jax.tree.flatten(model)

    def loss(weights: list[jax.Array]) -> jax.Array:
        return jnp.square(jax.nn.logsumexp(jax.tree.unflatten(structure, weights)(jnp.asarray(TOKENS)), axis=-1)).mean()

    return list(map(np.asarray, jax.jit(jax.grad(loss))(weights)))


@pytest.mark.slow
def test_a_mesh_that_the_caller_has_set_does_not_matter():
    tokens = jnp.asarray(TOKENS)
    expected = alone()(tokens)
    for mesh in (make_mesh("tensor=4"), jax.make_mesh((4,), ("x",), devices=jax.devices("cpu")[:4])):
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(on("tensor=4")(tokens), expected, atol=1e-5, rtol=0)


def test_other_passes_are_refused():
    with pytest.raises(
        NotImplementedError, match=r"spread over a mesh .*; got another pass over its layers\. Load the model without"
    ):
        on("fsdp=4").scan(jnp.asarray(TOKENS), lambda *args: args)

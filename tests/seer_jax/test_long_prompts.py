"""Long prompts: what they need in memory, read off the compiled program, and that working in chunks changes nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax import plan_memory
from seer_jax.inference.memory import tree_bytes
from seer_jax.models import layers
from seer_jax.models.cache import Cache
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import SinkWindow
from tests.seer_jax.conftest import LLAMA, tiny_model

TOKENS = 131072  # the context of Llama 3.1
WIDE = dataclasses.replace(
    LLAMA, hidden_size=32, intermediate_size=8192, num_layers=256, num_heads=2, num_kv_heads=1, vocab_size=8192
)
FLOAT32 = 4


def scratch_bytes(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """What a dense prefill with a donated cache takes besides its arguments and results, and the size of the cache."""
    model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.make_cache(1, tokens))
    run = jax.jit(lambda model, tokens, cache: model.prefill(tokens, None, cache), donate_argnums=2)
    memory = run.lower(model, jax.ShapeDtypeStruct((1, tokens), jnp.int32), cache).compile().memory_analysis()
    assert memory is not None
    size = tree_bytes(cache.token_arrays)
    assert memory.alias_size_in_bytes >= size  # the results take the place of the cache that was given away
    return memory.temp_size_in_bytes, size


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize(
    ("rows", "policy"), [pytest.param(1, Dense(), marks=pytest.mark.slow), (2, TokenBudget(1024))], ids=str
)
def test_new_tokens_copy_no_cache(rows: int, policy: Policy):
    model = tiny_model()
    cache = jax.eval_shape(lambda: model.make_cache(rows, TOKENS))

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(model: Transformer, tokens: jax.Array, cache: Cache) -> Cache:
        step = functools.partial(model.decode, sparsity=policy)
        return jax.lax.fori_loop(0, 4, lambda _, cache: step(tokens, cache)[1], cache)

    memory: Any = decode.lower(model, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= tree_bytes(cache) > 10 * memory.temp_size_in_bytes


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("tokens", [pytest.param(TOKENS, marks=pytest.mark.slow), TOKENS - 23])
def test_nothing_is_made_whole_that_could_be_made_in_chunks(tokens: int):
    """Neither [T, F] of the MLP, nor [T, V] of the output head, nor a second cache."""
    scratch, cache = scratch_bytes(WIDE, tokens)
    mlp, logits = (tokens * width * FLOAT32 for width in (WIDE.intermediate_size, WIDE.vocab_size))
    assert scratch < min(mlp, logits, cache) / 2


@pytest.mark.cpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_dense_first_layers_copy_neither_weights_nor_cache():
    """Two loops over the layers need no more than one, but for one layer's weights in each phase where a loop has a single layer."""
    config = dataclasses.replace(LLAMA, hidden_size=128, intermediate_size=1024, num_layers=8)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    one_layer = sum(x.size for x in jax.tree.leaves(model.layers)) / config.num_layers * FLOAT32

    def scratch_of(dense_layers: int) -> int:
        policy = TopK(0.1, SinkWindow(), dense_layers=dense_layers)
        sizes: dict[str, Any] = dict(max_new_tokens=8, prefill=policy, decode=policy, cache_capacity=16384)
        plan = plan_memory(model, 2, 128, **sizes)
        assert plan.scratch is not None and plan.cache > 30 * one_layer
        return plan.scratch

    assert scratch_of(1) < scratch_of(0) + 2.5 * one_layer


def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(layers, "TOKENS_PER_TILE", 8)


def random_tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, LLAMA.vocab_size, shape), jnp.int32)


def largest_difference(a: Any, b: Any) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 13, 16, 20, 24, 31])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_token_is_updated_once(batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch):
    """Whether tokens divide into chunks or not, and whether the batch has more rows than a chunk may have tokens."""
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 8)
    monkeypatch.setattr(layers, "TOKENS_PER_TILE", 4)
    x = jnp.arange(2.0 * batch * tokens).reshape(batch, tokens, 2)
    np.testing.assert_array_equal(layers.update_tokens(lambda x, y: 2 * x + y, x, x + 1), 3 * x + 1)


@pytest.mark.parametrize("policy", [pytest.param(Dense(), marks=pytest.mark.slow), TopK(0.3)], ids=str)
def test_chunks_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny_model(), random_tokens(3, 70)

    def run() -> jax.Array:
        return jax.jit(lambda model, ids: model(ids, sparsity=policy))(model, ids)

    whole = run()
    few_at_once(monkeypatch)
    assert largest_difference(run(), whole) < 1e-5


@pytest.mark.slow
def test_gradients_through_chunks(monkeypatch: pytest.MonkeyPatch):
    """With respect to all weights, at a length that chunks do not divide."""
    graph, weights = nnx.split(tiny_model(gates=False))
    ids = random_tokens(2, 70)

    def gradient() -> Any:
        def loss(weights: Any) -> jax.Array:
            return jnp.square(nnx.merge(graph, weights)(ids)).mean()

        return jax.jit(jax.grad(loss))(weights)

    whole = gradient()
    few_at_once(monkeypatch)
    assert largest_difference(gradient(), whole) < 1e-5 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))

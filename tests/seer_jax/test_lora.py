"""LoRA adapters: what they compute, their gradients, and what merging gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax.lora import LoraConfig, adapted, add_lora, linears_of, lora_config, merge_lora
from seer_jax.models.decoder import Transformer
from seer_jax.models.layers import BaseParam, LoraParam
from seer_jax.sharding import make_mesh, place
from tests.train.tiny import make_model

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 24)))
CONFIGS = [LoraConfig(4, 8.0), LoraConfig(2, 3.0, ("q_proj", "v_proj", "down_proj"))]

pytestmark = pytest.mark.usefixtures("compile_quickly")


def with_lora(config: LoraConfig, dtype: jnp.dtype = jnp.float32) -> Transformer:
    """A model whose adapter is not zero."""
    model = add_lora(make_model(dtype=dtype), config)
    rng = np.random.default_rng(1)
    for lora in adapted(model).values():
        lora.b.set_value(jnp.asarray(rng.normal(size=lora.b.shape) * 0.1, jnp.float32))
    return model


def loss(model: Transformer) -> jax.Array:
    return jnp.square(model(TOKENS)).mean()


def test_an_adapter_computes_what_the_merged_weights_compute():
    config = CONFIGS[1]
    model, logits = with_lora(config), jax.jit(lambda model: model(TOKENS))
    merged = merge_lora(model)
    assert lora_config(model) == config and lora_config(merged) is None and adapted(model)
    changed = logits(model)
    np.testing.assert_allclose(changed, logits(merged), atol=2e-5)
    assert np.abs(changed - logits(make_model())).max() > 1e-2
    np.testing.assert_array_equal(logits(add_lora(make_model(), config)), logits(make_model()))
    cache = model.make_cache(2, 32)
    last, cache, _ = jax.jit(lambda model, cache: model.prefill(TOKENS[:, :-1], None, cache))(model, cache)
    last, _, _ = jax.jit(lambda model, cache: model.decode(TOKENS[:, -1], cache))(model, cache)
    np.testing.assert_allclose(last, changed[:, -1], atol=2e-4)


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    """dA = scale B^T dW and dB = scale dW A^T, with W the merged weight."""
    config = CONFIGS[0]
    model = with_lora(config)
    graph, trained, frozen = nnx.split(model, LoraParam, ...)
    found = jax.jit(jax.grad(lambda trained: loss(nnx.merge(graph, trained, frozen))))(trained)
    merged_graph, weights, rest = nnx.split(merge_lora(model), BaseParam, ...)
    of_weights = jax.jit(jax.grad(lambda weights: loss(nnx.merge(merged_graph, weights, rest))))(weights)
    for path, lora in adapted(model).items():
        part, name = path.split(".")
        weight = np.asarray(of_weights["layers"][part][name]["weight"][...])
        ours = found["layers"][part][name]["lora"]
        a, b = np.asarray(lora.a[...]), np.asarray(lora.b[...])
        for got, expected in (
            (ours["a"], np.einsum("lor,loi->lri", b, weight)),
            (ours["b"], np.einsum("loi,lri->lor", weight, a)),
        ):
            np.testing.assert_allclose(
                got[...], config.alpha / config.rank * expected, atol=1e-4 * np.abs(expected).max()
            )


def test_adapters_are_float32_whatever_the_model_is():
    model = with_lora(CONFIGS[1], jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, LoraParam))} == {jnp.dtype("float32")}
    assert model(TOKENS).dtype == jnp.float32 and merge_lora(model).dtype == jnp.bfloat16
    assert {linear.weight.dtype for linear in linears_of(merge_lora(model)).values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("rank", "alpha"), [(7, 0.1), (3, 1e-12), (6, 1e30), (16, 32.0)])
def test_a_model_tells_the_settings_of_its_adapter(rank: int, alpha: float):
    config = LoraConfig(rank, alpha)
    assert lora_config(add_lora(make_model(), config)) == config


def test_adapters_are_split_as_their_weights():
    model = add_lora(place(make_model(), make_mesh("fsdp=2,tensor=2")), LoraConfig(4))
    for path, parts in {
        "self_attn.q_proj": ((2, 4, 32), (2, 16, 4)),
        "mlp.down_proj": ((2, 4, 16), (2, 16, 4)),
    }.items():
        lora = adapted(model)[path]
        assert tuple(x[...].addressable_shards[0].data.shape for x in (lora.a, lora.b)) == parts
    assert merge_lora(model).layout == model.layout


REFUSED = [
    (lambda: LoraConfig(-1), r"LoraConfig\.rank must be at least 0; got -1"),
    (lambda: LoraConfig(4, 0.0), r"LoraConfig\.alpha must be positive; got 0"),
    (lambda: LoraConfig(4, targets=()), r"targets must name linear maps, each once; got \[\]"),
    (lambda: LoraConfig(4, targets=("q_proj", "q_proj")), r"targets must name linear maps, each once"),
    (lambda: add_lora(make_model(), LoraConfig(0)), r"rank of at least 1; got LoraConfig\.rank=0"),
    (
        lambda: add_lora(make_model(), LoraConfig(4, targets=("wq",))),
        r"must be linear maps .* q_proj, .*; got wq\. Name some",
    ),
    (lambda: add_lora(with_lora(CONFIGS[0]), CONFIGS[0]), r"one adapter at most; it has one\. Merge it first"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_adapter(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()

"""A family defined outside the product: a tiny mixture of experts that converts, runs, decodes, generates and distils like the others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from safetensors.numpy import load_file

from seer_jax import CumulativeMass, TopK, from_pretrained, generate
from seer_jax.convert import load_base, save_base, stream
from seer_jax.convert.formats.sources import ArraySource
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.config import ModelConfig, RopeConfig
from seer_jax.models.decoder import Transformer
from seer_jax.models.families import Family, config_from_hf, config_to_hf, register_family
from seer_jax.models.layers import BaseParam, Linear
from seer_jax.train import DistillConfig, OptimizerConfig, TrainedGates, distill

# ------------------------------------------------------------------------------------------------------------ the family


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ModelConfig):
    """A decoder whose MLPs are mixtures of experts."""

    num_experts: int
    experts_per_token: int = 2


class Experts(nnx.Module):
    """sum over the chosen experts e of weight_e down_e(silu(gate_e(x)) * up_e(x)), where the router chooses and weighs."""

    def __init__(self, config: ExpertsConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size

        def stacked(rows: int, columns: int) -> BaseParam:
            noise = jax.random.normal(rngs.params(), (experts, rows, columns), jnp.float32)
            return BaseParam((noise * columns**-0.5).astype(dtype))

        self.router = Linear(width, experts, bias=False, dtype=dtype, rngs=rngs)
        self.gate, self.up, self.down = stacked(inner, width), stacked(inner, width), stacked(width, inner)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32))
        best, chosen = jax.lax.top_k(shares, self.config.experts_per_token)
        best /= best.sum(-1, keepdims=True)
        weights = (jax.nn.one_hot(chosen, self.config.num_experts) * best[..., None]).sum(-2)
        hidden = jax.nn.silu(jnp.einsum("btd,eid->btei", x, self.gate[...])) * jnp.einsum(
            "btd,eid->btei", x, self.up[...]
        )
        return jnp.einsum("btei,edi,bte->btd", hidden, self.down[...], weights.astype(x.dtype))


EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
register_family(
    Family(
        "tiny_experts",
        "TinyExpertsForCausalLM",
        keys={"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"},
        config=ExpertsConfig,
        mlp=Experts,
        rules=(
            ("model.layers.{layer}.block_sparse_moe.gate.weight", "layers.mlp.router.weight"),
            (EXPERTS + "w1.weight", "layers.mlp.gate"),
            (EXPERTS + "w3.weight", "layers.mlp.up"),
            (EXPERTS + "w2.weight", "layers.mlp.down"),
        ),
    )
)
CONFIG = ExpertsConfig(
    *("tiny_experts", 48, 32, 24, 3, 4, 2, 16),
    num_experts=4,
    rope=RopeConfig(original_max_position=256),
    max_position_embeddings=256,
)
BLOCK = 16

# -------------------------------------------------------------------------------------------------------------- the tests

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model.layers.self_attn.q_proj.weight[...] *= 4  # sharp attention, so that blocks matter
    return model


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    save_base(model, folder)
    return folder


def tokens(rows: int = 2, length: int = 70) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (rows, length))


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_experts_compute_what_their_definition_says(model: Transformer):
    """Against one token and one expert at a time."""
    mlp: Any = jax.tree.map(lambda x: x[1], model.layers.mlp)
    x = np.random.default_rng(0).normal(size=(2, 5, CONFIG.hidden_size)).astype(np.float32)
    router, gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.router.weight, mlp.gate, mlp.up, mlp.down))
    expected = np.zeros_like(x)
    for place in np.ndindex(2, 5):
        logits = router @ x[place]
        chosen = np.argsort(-logits)[:2]
        for e in chosen:
            a = gate[e] @ x[place]
            weight = np.exp(logits[e]) / np.exp(logits[chosen]).sum()
            expected[place] += weight * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ x[place])))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=2e-5)


def test_the_configuration_goes_both_ways():
    hf = json.loads(json.dumps(config_to_hf(CONFIG)))
    assert (hf["num_local_experts"], hf["num_experts_per_tok"]) == (4, 2)
    assert (hf["model_type"], hf["architectures"]) == ("tiny_experts", ["TinyExpertsForCausalLM"])
    assert config_from_hf(hf) == CONFIG
    del hf["num_experts_per_tok"]
    assert config_from_hf(hf) == CONFIG  # the field has a default
    del hf["num_local_experts"]
    with pytest.raises(ValueError, match=r"of a tiny_experts model needs num_local_experts; got keys"):
        config_from_hf(hf)


def test_checkpoints_have_a_tensor_for_each_expert(model: Transformer, folder: Path):
    stored = load_file(folder / "model.safetensors")
    mlp: Any = model.layers.mlp
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        np.testing.assert_array_equal(stored[prefix + "gate.weight"], mlp.router.weight[layer])
        for expert in range(CONFIG.num_experts):
            for name, ours in names.items():
                expected = getattr(mlp, ours)[layer, expert]
                np.testing.assert_array_equal(stored[f"{prefix}experts.{expert}.{name}.weight"], expected)
    assert sum("experts" in name for name in stored) == 3 * CONFIG.num_layers * CONFIG.num_experts
    assert not any(".mlp." in name for name in stored)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_it_is_read_back_bit_for_bit(model: Transformer, shard_bytes: int, tmp_path: Path):
    save_base(model, tmp_path, shard_bytes=shard_bytes)
    assert_same(load_base(tmp_path, dtype=jnp.float32), model)


@pytest.mark.parametrize("spec", [P("x"), P("x", "y"), P(None, "y", "x"), P(None, None, "x", "y")])
def test_any_part_of_stacked_experts_is_read_alone(spec: P):
    """As devices that hold some of the layers, experts, rows or columns read theirs."""
    whole = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)
    keys = [f"{layer}.{expert}" for layer, expert in np.ndindex(2, 4)]
    source = ArraySource("memory", dict(zip(keys, whole.reshape(8, 6, 4), strict=True)))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    shape = jax.ShapeDtypeStruct(whole.shape, jnp.float32)
    array = stream._fill(shape, keys, source, NamedSharding(mesh, spec))
    assert array.sharding == NamedSharding(mesh, spec)
    np.testing.assert_array_equal(array, whole)


def test_a_missing_expert_is_told(folder: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | dict(num_local_experts=5)
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"missing: .*layers\.0\.block_sparse_moe\.experts\.4\.w1\.weight"):
        load_base(tmp_path)


def test_decoding_continues_what_a_whole_pass_computes(model: Transformer):
    """The decode path reads each layer's weights where they lie in the stack."""
    ids = jnp.asarray(tokens())
    whole = jax.jit(lambda model, ids: model(ids))(model, ids)
    logits, cache, _ = jax.jit(lambda m, ids: m.prefill(ids, None, m.make_cache(2, 80)))(model, ids[:, :64])
    decode = jax.jit(lambda model, token, cache: model.decode(token, cache))
    np.testing.assert_allclose(logits, whole[:, 63], atol=1e-4)
    for position in range(64, 70):
        logits, cache, _ = decode(model, ids[:, position], cache)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-4)


@pytest.mark.slow
def test_gates_are_distilled_saved_and_used(model: Transformer, folder: Path, tmp_path: Path):
    sizes: dict[str, Any] = dict(block_size=BLOCK, gate_dim=CONFIG.head_dim)
    config = DistillConfig(
        model=str(folder),
        output=str(tmp_path),
        kind=TrainedGates.BOTH,
        prefill=PrefillGateConfig(**sizes),
        decode=DecodeGateConfig(**sizes),
        sequence_length=8 * BLOCK,
        batch_size=2,
        micro_batch_size=2,
        steps=4,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        tensorboard=False,
    )
    losses = []
    result = distill(
        config, model=model, dataset=tokens(4, 8 * BLOCK), progress=lambda report: losses.append(report.metrics["loss"])
    )
    assert losses[-1] < losses[0]
    base = nnx.state(result.model, BaseParam)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(base), nnx.to_pure_dict(nnx.state(model, BaseParam)))
    loaded = from_pretrained(folder, result.gates, dtype=jnp.float32)
    assert_same(loaded, result.model)
    prompts = tokens()
    settings: dict[str, Any] = dict(max_new_tokens=6, eos=())
    dense = generate(loaded, prompts, **settings)
    every = generate(loaded, prompts, prefill=CumulativeMass(1.0), decode=CumulativeMass(1.0), **settings)
    np.testing.assert_array_equal(dense.rows(), every.rows())
    sparse = generate(loaded, prompts, prefill=TopK(0.3), decode=TopK(0.5), **settings)
    assert float(np.mean(sparse.prefill_kept)) < 1


def test_a_family_has_a_model_type_of_its_own():
    with pytest.raises(ValueError, match=r"model_type must be its own; got 'llama', which exists\. Choose another"):
        register_family(Family("llama", "OtherForCausalLM"))

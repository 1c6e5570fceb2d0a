"""Meshes from text, and the table of how weights are split."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from seer_jax.convert.base import abstract_model
from seer_jax.convert.gates import abstract_gate
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig, QueryReduction
from seer_jax.lora import LoraConfig, abstract_lora, place
from seer_jax.models.config import ModelConfig
from seer_jax.models.decoder import Transformer
from seer_jax.sharding import Layout, make_mesh
from seer_jax.sharding.layout import weights_of
from seer_jax.sharding.table import GATES, WEIGHTS
from tests.seer_jax.conftest import LLAMA, QWEN3

CPUS = jax.devices("cpu")
BIASED = dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True)
LLAMA_70B = ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,fsdp=1,tensor=2", (2, 1, 2)),
        (" tensor = 2 , data=2", (2, 1, 2)),
        ("fsdp=3", (1, 3, 1)),
        ("tensor=2,fsdp=-1", (1, 2, 2)),
        ("data=-1", (4, 1, 1)),
    ],
)
def test_a_mesh_is_written_as_axes_with_sizes(text: str, sizes: tuple[int, ...]):
    mesh = make_mesh(text, CPUS[:4])
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == sizes
    assert list(mesh.devices.flat) == CPUS[: mesh.size]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"written as axes with sizes, each of data, fsdp, tensor at most once; got '' in ''\. Write for example data=2",
        ),
        ("dat=2", r"each of data, fsdp, tensor at most once; got 'dat=2' in 'dat=2'"),
        ("data", "got 'data' in 'data'"),
        ("data=2,data=2", "got 'data=2' in 'data=2,data=2'"),
        ("data=2,", "got '' in 'data=2,'"),
        ("data=0", "a whole number of devices, or -1 for all that are left; got 'data=0'"),
        ("data=1.5", "or -1 for all that are left; got 'data=1.5'"),
        ("data=-2", "got 'data=-2'"),
        ("data=-1,fsdp=-1", "At most one axis of a mesh may have size -1; got 'data=-1,fsdp=-1'"),
        (
            "data=-1,fsdp=3",
            r"must divide the 4 devices by its other axes; got 'data=-1,fsdp=3', whose other axes have 3",
        ),
        (
            "data=2,tensor=4",
            r"must fit the 4 devices .* \(cpu\); got 'data=2,tensor=4', which is 8 devices.*device_count=8",
        ),
    ],
)
def test_what_is_no_mesh_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_mesh(text, CPUS[:4])


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({}, "tensor=3", r"The 4 query heads .* divisible by the mesh axis tensor; got tensor=3\. Use tensor=1 or 2 or 4\."),
        (dict(num_heads=6, num_kv_heads=3, vocab_size=66), "tensor=2", r"The 3 key/value heads .*, or divide it; got tensor=2\. Use tensor=1 or 3 or 6\."),
        (dict(intermediate_size=50), "tensor=4", "The model's intermediate_size of 50 .* tensor; got tensor=4. Use tensor=1 or 2"),
        (dict(vocab_size=63), "tensor=2", r"The model's vocab_size of 63 .* tensor; got tensor=2\. Use tensor=1\."),
        (dict(hidden_size=33), "fsdp=2", "The model's hidden_size of 33 .* fsdp; got fsdp=2. Use an fsdp size that divides 1,"),
        (dict(vocab_size=62), "fsdp=2,tensor=2", "The model's vocab_size / 2 of 31 .* fsdp; got fsdp=2"),
    ],
)  # fmt: skip
def test_impossible_splits_are_refused_by_name(changes: dict[str, Any], text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Layout.of(make_mesh(text, CPUS[:4]), dataclasses.replace(LLAMA, **changes))


def test_meshes_of_the_users_own():
    explicit = jax.make_mesh((2, 2), ("tensor", "data"), axis_types=(AxisType.Explicit,) * 2, devices=CPUS[:4])
    layout = Layout.of(explicit, LLAMA)
    assert layout.mesh.axis_names == ("data", "fsdp", "tensor") and layout.mesh.axis_types == (AxisType.Auto,) * 3
    assert (np.asarray(layout.mesh.devices)[:, 0] == explicit.devices.T).all()
    other = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=CPUS[:2])
    with pytest.raises(
        ValueError, match=r"axes among data, fsdp, tensor; got model\. Rename model, or make the mesh by"
    ):
        Layout.of(other, LLAMA)


def with_gates(config: ModelConfig, one_linear: bool, reduction: QueryReduction) -> Transformer:
    """A model of shapes with both gates and an adapter."""
    dim = config.head_dim
    prefill = PrefillGateConfig(gate_dim=dim, force_double=not one_linear)
    decode = DecodeGateConfig(gate_dim=dim, query_reduction=reduction)
    model = abstract_model(config).attach(*(abstract_gate(gate, config) for gate in (prefill, decode)))
    for path, lora in abstract_lora(model, LoraConfig(rank=4)).items():
        place(model, path, lora)
    return model


def test_the_table_has_each_weight_and_no_other():
    used = set()
    layout = Layout.of(make_mesh("data=1,fsdp=2,tensor=2", CPUS[:4]), LLAMA)
    for config in (BIASED, QWEN3):
        for one, reduction in ((True, QueryReduction.PROJ), (False, QueryReduction.AVG_PROJ)):
            for path, array in weights_of(with_gates(config, one, reduction))[0]:
                spec = layout.weight_spec(path, array.shape)
                used.add(path.removeprefix(GATES[0]).removeprefix(GATES[1]))
                assert len(spec) <= len(array.shape)
                if path not in ("embed_tokens", "lm_head", "norm"):
                    assert not spec or spec[0] is None, f"{path}: the axis over layers is split"
    assert used == WEIGHTS.keys()
    with pytest.raises(NotImplementedError, match=r"table.WEIGHTS splits; got layers.mlp.router.weight. Add a row"):
        layout.weight_spec("layers.mlp.router.weight", (2, 4, 32))


def test_each_device_has_an_equal_part_of_a_large_model():
    """Llama 70B over four devices: a quarter of the weights each, but for the norms."""
    layout = Layout.of(make_mesh("fsdp=2,tensor=2", CPUS[:4]), LLAMA_70B)
    model = layout.placed(abstract_model(LLAMA_70B))
    whole, part = (sum(math.prod(of(x)) for x in jax.tree.leaves(model)) for of in (whole_shape, part_shape))
    assert part == pytest.approx(whole / 4, rel=1e-4)


def whole_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape


def part_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    assert x.sharding is not None
    return x.sharding.shard_shape(x.shape)

"""Memory that each device of a mesh needs, planned without the devices, against what devices hold and what programs for them lay out."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from seer_jax import Given, MemoryPlan, Threshold, TokenBudget, TopK, Transformer, generate, plan_memory
from seer_jax.bench.configs import MODELS, ModelShape
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference import memory
from seer_jax.inference.memory import available_memory
from seer_jax.sharding import make_abstract_mesh, make_mesh, place
from tests.seer_jax.conftest import LLAMA, tiny_model

# Shapes stand for arrays.
pytestmark = [pytest.mark.mesh, pytest.mark.usefixtures("compile_quickly"), pytest.mark.usefixtures("unchecked")]

MESHES = ["data=2,tensor=2", "fsdp=4", "tensor=4"]
# Weights that a layer gathers weigh as much as activations; biases are there.
CONFIG = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=256, qkv_bias=True, o_bias=True)
PER_HEAD = Threshold(np.linspace(0.05, 0.3, 8, dtype=np.float32).reshape(2, 4))
ROWS, WIDTH, NEW = 4, 512, 6
SPARSE: dict[str, Any] = dict(prefill=PER_HEAD, decode=TokenBudget(32), max_new_tokens=NEW)


@functools.cache
def alone() -> Transformer:
    return tiny_model(CONFIG)


@functools.cache
def on(text: str) -> Transformer:
    return place(alone(), make_mesh(text))


def plan(model: Transformer, **changes: Any) -> MemoryPlan:
    return plan_memory(model, ROWS, WIDTH, **SPARSE | changes)


@pytest.mark.filterwarnings("ignore:4 devices of the mesh axis tensor share:RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("text", "streamed"), [(MESHES[0], False), (MESHES[1], True), (MESHES[2], False)])
def test_a_plan_without_devices_is_that_of_the_program_on_them(text: str, streamed: bool):
    planned, real = plan(alone(), mesh=text, streamed=streamed), plan(on(text), streamed=streamed)
    assert planned.devices == real.devices == 4
    assert planned.scratch is not None and real.scratch is not None
    assert planned.scratch == pytest.approx(real.scratch, rel=0.02)
    assert planned == dataclasses.replace(real, scratch=planned.scratch)
    (first, *_) = make_mesh(text).devices.flat

    def held(tree: Any) -> int:
        return sum(p.data.nbytes for x in jax.tree.leaves(tree) for p in x.addressable_shards if p.device == first)

    model = on(text)
    cache = model.make_cache(ROWS, 576)
    gates = held((model.prefill_gate, model.decode_gate))
    assert (real.gates, real.weights) == (gates, held(model) - gates)
    assert (real.cache, real.gate_cache) == (held(cache.token_arrays), held(cache.gate_arrays))


def test_masks_and_rows_that_devices_do_not_divide_are_planned():
    """Three rows for two devices along data: each has all of them. Masks are split with the heads."""
    mask = jnp.ones((2, 3, 4, 32, 32), bool)
    settings: dict[str, Any] = SPARSE | dict(prefill=Given(mask, block_size=16), compiled=False)
    made = plan_memory(alone(), 3, WIDTH, mesh=make_abstract_mesh("data=2,tensor=2"), **settings)
    whole = plan_memory(alone(), 3, WIDTH, **settings)
    assert made.cache * 2 == whole.cache


@functools.cache
def llama_70b() -> Transformer:
    def build() -> Transformer:
        model = Transformer(MODELS[ModelShape.LLAMA_3_1_70B], rngs=nnx.Rngs(0))
        model.add_gate(PrefillGateConfig(), rngs=nnx.Rngs(1))
        return model.add_gate(DecodeGateConfig(), rngs=nnx.Rngs(2))

    return nnx.eval_shape(build)


SPARSE_70B: dict[str, Any] = dict(prefill=TopK(0.1), decode=TokenBudget(4096))


@pytest.mark.parametrize(
    ("mesh", "cache", "new", "policies"),
    [("tensor=8", 5.0, 2, {}), pytest.param("fsdp=8", 40.0, 1024, SPARSE_70B, marks=pytest.mark.slow)],
)
def test_a_model_of_70b_is_planned_for_eight_devices(mesh: str, cache: float, new: int, policies: dict[str, Any]):
    """141 GB of weights over 8 devices, and the keys and values of 128k tokens, as everyone's arithmetic has them; scratch holds a layer's
    activations, and with fsdp its weights."""
    sizes: dict[str, Any] = dict(max_new_tokens=new, cache_capacity=131072, available=130 * 2**30, prefill_chunk=0)
    made = plan_memory(llama_70b(), 1, 130048, mesh=mesh, **sizes, **policies)
    assert made.weights == pytest.approx(70.55e9 * 2 / 8, rel=1e-3)
    assert made.cache == cache * 2**30
    hidden, layer = 130048 * 8192 * 2, 0.855e9 * 2
    assert made.scratch is not None and hidden + layer * (mesh == "fsdp=8") < made.scratch < 40 * 2**30
    assert made.missing == 0
    made.check()


def test_generation_on_a_mesh_is_refused_before_prompts_are_read(monkeypatch: pytest.MonkeyPatch):
    tokens = np.ones((ROWS, WIDTH), np.int32)
    needed, told = plan(on(MESHES[0]), compiled=False), memory.DeviceMemory(2**40, 0)
    monkeypatch.setattr(memory, "device_memory", lambda device: told)
    module = sys.modules["seer_jax.inference.generate"]
    monkeypatch.setattr(module, "_run", None)
    # CPU devices share what their host has.
    told = memory.DeviceMemory(4 * needed.total - 1, memory.tree_bytes(on(MESHES[0])) // 4)
    with pytest.raises(MemoryError, match=r"memory: each of 4 devices needs 0.00\d GiB \(weights.*fewer rows"):
        generate(on(MESHES[0]), tokens, **SPARSE)


def test_available_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch):
    model, devices = on("tensor=2"), make_mesh("tensor=2").devices.flat
    own = memory.tree_bytes([x.addressable_shards[0].data for x in jax.tree.leaves(model)])
    used = dict(zip(devices, (own + 7, own + 9), strict=True))
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(own + 100, used[device]))
    monkeypatch.setattr(memory, "_is_cpu", lambda device: False)
    assert available_memory(model) == (own + 100, 9, 0)
    monkeypatch.setattr(memory, "_is_cpu", lambda device: True)
    assert available_memory(model) == ((own + 100) // 2, 0, 0)
    assert plan(alone(), mesh="tensor=2", compiled=False).available is None


def test_a_plan_says_that_it_is_of_each_device():
    text = str(plan(alone(), mesh="tensor=2", compiled=False))
    assert text.startswith("each of 2 devices\nweights ") and "devices" not in str(plan(alone(), compiled=False))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=3", r"4 query heads .* divisible by the mesh axis tensor; got tensor=3\. Use tensor=1 or 2 or 4"),
        ("tensor=-1", r"planned must have a size for each axis; got 'tensor=-1'\. Write for example tensor=8"),
        ("rows=2", "each of data, fsdp, tensor at most once; got 'rows=2'"),
        (AbstractMesh((2,), ("x",)), "axes among data, fsdp, tensor; got x"),
    ],
)
def test_meshes_that_cannot_be_planned_are_refused(mesh: Any, message: str):
    with pytest.raises(ValueError, match=message):
        plan(alone(), mesh=mesh)
    with pytest.raises(ValueError, match="mesh must be left out for a model that lies on one"):
        plan(on("tensor=2"), mesh="tensor=2")

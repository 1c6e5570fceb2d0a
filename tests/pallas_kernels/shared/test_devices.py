"""Devices of arrays, and programs for CPUs and GPUs in a process that has both."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import block_sparse_attention, devices, score_blocks
from pallas_kernels.block_ground_truth import cases as ground_truth
from pallas_kernels.block_pooling import cases as pooling
from pallas_kernels.block_sparse_attention import cases as sparse_attention
from pallas_kernels.cases import Heads
from pallas_kernels.gate_scores import cases as scores
from pallas_kernels.gate_selection import cases as selection
from pallas_kernels.precision import precise_einsum
from pallas_kernels.sparse_decode import cases as decode
from pallas_kernels.sparse_rows import Tiling
from pallas_kernels.stacked_linear import cases as linear
from pallas_kernels.sub_block_scores import cases as sub_block_scores
from tests.pallas_kernels.suites.comparison import KEY, assert_bitwise_equal, shapes

CPUS = jax.devices("cpu")
HEADS = Heads(2, 2, 64)
ATTENTION = sparse_attention.Case("small", HEADS, 128)
CALLS: dict[str, Any] = {
    "attention_with_block_scores": ground_truth.Case("small", HEADS, 128),
    "block_sparse_attention": ATTENTION,
    "pool_blocks": pooling.Case("small", 4, 64, 128, ("max", "avg")),
    "score_blocks": scores.Case("many", 1, 1, 64, 1024, 1024),
    "score_sub_blocks": sub_block_scores.Case("small", 2, 2, 64, 384, 384, 4, 4),
    "select_blocks": selection.Case("small", (2, 8, 64), threshold=0.02),
    "sparse_decode_attention": decode.Case("small", HEADS, 128),
    "stacked_linear": linear.Case("small", 128, (64,)),
}


def lowered(function: Callable, *arguments: Any, platform: str) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


class TestDevices:
    def test_committed_arrays_are_on_their_device(self):
        for device in CPUS:
            tree = {"a": jnp.ones(3), "b": (jax.device_put(jnp.ones(3), device), None, 1.0)}
            assert devices.device_of(tree) == device

    def test_arrays_that_are_not_committed_run_on_the_default_device(self):
        for device in CPUS:
            with jax.default_device(device):
                for tree in ((), jnp.ones(3), [1, "a"], jax.ShapeDtypeStruct((2,), "float32")):
                    assert devices.device_of(tree) == devices.default_device() == device

    def test_a_platform_as_default_device(self):
        with jax.default_device("cpu"):
            assert devices.default_device() == CPUS[0]

    def test_sharded_arrays_are_on_their_first_device(self):
        mesh = jax.sharding.Mesh(CPUS, ("model",))
        array = jax.device_put(jnp.ones(len(CPUS)), NamedSharding(mesh, P("model")))
        assert devices.device_of(array) == CPUS[0]

    def test_tracers_are_on_none(self):
        array = jax.device_put(jnp.ones(3), CPUS[0])
        seen = []
        jax.jit(lambda x: seen.extend([devices.device_of(x), devices.device_of((x, array)), devices.is_traced([x])]))(
            array
        )
        assert seen == [devices.default_device(), CPUS[0], True]
        assert not devices.is_traced([array, 1.0])

    def test_tf32_needs_gpus_from_ampere_on(self, hopper: Any):
        assert devices.has_tf32() and not devices.has_only_cpus()
        hopper.compute_capability = "7.5"
        assert not devices.has_tf32()


@pytest.mark.cpu
def test_this_machine_has_only_cpus():
    assert devices.local_gpus() == () and devices.has_only_cpus() and not devices.has_tf32()


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_an_operation_lowers_to_its_kernel_on_gpus_alone(hopper: Any, name: str):
    arguments, static = shapes(CALLS[name])
    call = functools.partial(getattr(pallas_kernels, name), **static)
    for platform, is_kernel in (("cpu", False), ("cuda", True)):
        text = lowered(lambda x: call(**x), arguments, platform=platform)
        assert ("mosaic_gpu" in text) == is_kernel
        assert not is_kernel or "stablehlo.while" not in text  # XLA's attention has loops


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_by_name_needs_a_hopper_gpu(name: str):
    with pytest.raises(NotImplementedError, match=r"needs a GPU of compute capability 9.0 \(H100, H200\); got cpu"):
        getattr(pallas_kernels, name)(**CALLS[name].arguments(KEY), implementation="mosaic_gpu")


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_an_operation_on_a_cpu_beside_a_gpu_gives_what_xla_gives(hopper: Any, name: str):
    case = CALLS[name]
    operation, arguments = getattr(pallas_kernels, name), case.arguments(KEY)
    static = {key: x for key, x in arguments.items() if key in shapes(case)[1]}
    arrays = {key: x for key, x in arguments.items() if key not in static}
    truth = operation(**arguments, implementation="xla")
    assert_bitwise_equal(operation(**arguments), truth)
    assert_bitwise_equal(jax.jit(functools.partial(operation, **static))(**arrays), truth)


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda f: jax.grad(lambda x: (f(x)[0].astype("float32") * x["q"]).sum(), allow_int=True),
    "vmap": lambda f: lambda x: jax.vmap(f)(jax.tree.map(lambda a: a[None], x)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, a: (c, f(a)), 0, jax.tree.map(lambda a: a[None], x))[1],
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x)[0].astype("float32").sum(), allow_int=True),
    "shard_map": lambda f: jax.shard_map(
        f, mesh=jax.make_mesh((1,), ("x",)), in_specs=P(), out_specs=P(), check_vma=False
    ),
}


SELECTED = [pytest.param(x, marks=pytest.mark.slow if x in ("vmap", "scan", "checkpoint") else ()) for x in TRANSFORMS]


@pytest.mark.cpu
@pytest.mark.parametrize("transform", SELECTED)
def test_transformed_attention_lowers_to_its_kernel_on_gpus_alone(hopper: Any, transform: str):
    arguments = ATTENTION.arguments(KEY)

    def attend(x: Any, implementation: Any = None) -> Any:
        return block_sparse_attention(**x, return_lse=True, implementation=implementation)

    run = TRANSFORMS[transform](attend)
    assert "mosaic_gpu" in lowered(run, arguments, platform="cuda")
    assert "mosaic_gpu" not in lowered(run, arguments, platform="cpu")
    truth = jax.jit(TRANSFORMS[transform](functools.partial(attend, implementation="xla")))(arguments)
    for got, expected in zip(jax.tree.leaves(jax.jit(run)(arguments)), jax.tree.leaves(truth), strict=True):
        if got.dtype != jax.dtypes.float0:
            assert jnp.allclose(got, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.cpu
def test_a_compiled_program_has_no_branch_left(hopper: Any):
    arguments = ATTENTION.arguments(KEY)
    compiled = jax.jit(lambda x: block_sparse_attention(**x)).lower(arguments).compile()
    assert "conditional" not in str(compiled.as_text())


@pytest.mark.cpu
def test_float32_products_take_tensor_cores_on_gpus_alone(hopper: Any):
    x = jnp.ones((2048, 8))
    product = functools.partial(precise_einsum, "nd,md->nm")
    gradient = jax.grad(lambda x, y: product(x, y).sum())
    assert "tf32" in lowered(product, x, x, platform="cuda") and "tf32" in lowered(gradient, x, x, platform="cuda")
    assert "tf32" not in lowered(product, x, x, platform="cpu")
    assert "tf32" not in lowered(product, x[:-1], x, platform="cuda")  # too few vectors to be faster
    hopper.compute_capability = "7.5"
    assert "tf32" not in lowered(lambda x, y: product(x, y), x, x, platform="cuda")


@pytest.mark.cpu
def test_sparse_rows_come_in_small_chunks_on_cpus_alone(monkeypatch: pytest.MonkeyPatch, hopper: Any):
    asked = []
    monkeypatch.setattr(Tiling, "rows_per_chunk", lambda _, elements, *rest: asked.append(elements) or len(asked))
    arguments, _ = shapes(sparse_attention.Case("rows", HEADS, 320, dtype="float32"))
    traced = jax.jit(lambda x: block_sparse_attention(**x)).trace(arguments)
    assert asked == [2**19, 2**25]  # chunks of one row and of two
    for platform, chunk in (("cpu", 1), ("cuda", 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<{10 // chunk}x{chunk}x64x64xf32>" in text
        assert f"tensor<{10 * chunk // 2}x{3 - chunk}x64x64xf32>" not in text


@pytest.mark.cpu
def test_programs_of_a_machine_without_gpus_do_not_depend_on_the_platform():
    arguments, _ = shapes(ATTENTION)
    x = jnp.ones((1, 1024, 2, 64))
    for jaxpr in (
        jax.make_jaxpr(lambda x: block_sparse_attention(**x))(arguments),
        jax.make_jaxpr(jax.grad(lambda x: score_blocks(x, x).sum()))(x),
    ):
        assert "platform" not in str(jaxpr)

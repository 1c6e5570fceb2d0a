"""`pool_blocks`: its implementations, and errors for invalid arguments."""

from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import pool_blocks
from pallas_kernels.block_pooling.cases import REAL, Case
from pallas_kernels.devices import assume_hopper
from tests.pallas_kernels.suites import block_pooling as suite
from tests.pallas_kernels.suites.comparison import assert_bitwise_equal, assert_lowers_for_cuda


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Conformance):
    implementation = "xla"


@pytest.mark.gpu
class TestMosaicGpu(suite.Conformance):
    implementation = "mosaic_gpu"


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
class TestMosaicGpuInterpreted(suite.Conformance):
    implementation = "mosaic_gpu"


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(pool_blocks, case)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 64, 3, 64), 64, r"takes a multiple of 256 channels in all heads together; got 3 \* 64"),
        ((1, 63, 4, 64), 64, "takes at least one whole block of 64 tokens; got 63"),
        ((1, 64, 4, 64), 4, "takes blocks of at least 8 tokens; got 4"),
    ],
)
def test_mosaic_gpu_leaves_the_rest_to_xla(shape: tuple[int, ...], size: int, message: str):
    x = jnp.ones(shape)
    with assume_hopper():
        with pytest.raises(NotImplementedError, match=message):
            pool_blocks(x, ("avg",), block_size=size, implementation="mosaic_gpu")
        pooled = pool_blocks(x, ("avg",), block_size=size)
    assert_bitwise_equal(pooled, pool_blocks(x, ("avg",), block_size=size, implementation="xla"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 12}, r"pool_blocks: block_size must be one of .* tokens; got 12"),
        ({"block_size": 8.0}, r"pool_blocks: block_size must be one of .* tokens; got 8.0"),
        ({"block_size": True}, r"pool_blocks: block_size must be one of .* tokens; got True"),
        ({"kinds": ()}, r"kinds must be a tuple of some of \('max', 'min', 'avg'\); got \(\)"),
        ({"kinds": "avg"}, r"kinds must be a tuple of some of \('max', 'min', 'avg'\); got 'avg'"),
        ({"kinds": ("avg", "sum")}, r"kinds must be .* some of .*; got \('avg', 'sum'\)"),
        ({"x": jnp.ones((2, 64, 8))}, r"x must be floats \[B, T, heads, D\], no axis empty; got float32 \(2, 64, 8\)"),
        ({"x": jnp.ones((1, 64, 0, 8))}, r"no axis empty; got float32 \(1, 64, 0, 8\)"),
        ({"x": jnp.ones((1, 64, 2, 8), int)}, r"x must be floats .*; got int32"),
        (
            {"valid": jnp.ones((2, 64), int)},
            r"valid must be bool, one of \(\(2, 64\), \(1, 64\)\); got int32 \(2, 64\)",
        ),
        ({"valid": jnp.ones((2, 63), bool)}, r"valid must be bool, .*; got bool \(2, 63\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        pool_blocks(**{"x": jnp.ones((2, 64, 2, 8)), "kinds": ("avg",), "block_size": 64} | changes)

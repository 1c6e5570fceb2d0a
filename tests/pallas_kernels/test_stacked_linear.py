"""`stacked_linear`: its implementations, and errors for invalid arguments."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import stacked_linear
from pallas_kernels.stacked_linear.cases import REAL, Case
from tests.pallas_kernels.suites import stacked_linear as suite
from tests.pallas_kernels.suites.comparison import assert_left_to_xla, assert_lowers_for_cuda


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Definition):
    implementation = "xla"


@pytest.mark.gpu
class TestMosaicGpu(suite.Definition):
    implementation = "mosaic_gpu"


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
class TestMosaicGpuInterpreted(suite.Definition):
    implementation = "mosaic_gpu"


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(stacked_linear, case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 and float16; got float32"),
        ({"rows": 65}, "takes at most 64 vectors; got 65"),
        ({"inputs": 64}, r"takes multiples of 128 inputs and 64 outputs; got 64 inputs and \(64,\) outputs"),
        ({"outputs": (64, 96)}, r"got 128 inputs and \(64, 96\) outputs"),
    ],
)
def test_mosaic_gpu_leaves_the_rest_to_xla(changes: dict[str, Any], message: str):
    assert_left_to_xla(stacked_linear, dataclasses.replace(Case("small", 128, (64,)), **changes), message)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones(4)}, r"stacked_linear: x must be floats \[R, in\], no axis empty; got float32 \(4,\)"),
        ({"x": jnp.ones((1, 4), int)}, r"x must be floats .*; got int32 \(1, 4\)"),
        ({"weights": []}, r"weights must be at least one array \[L, out, in\]; got none"),
        ({"weights": [jnp.ones((3, 2, 5))]}, r"in = 4; got float32 \(3, 2, 5\) for x float32 \(1, 4\)"),
        (
            {"weights": [jnp.ones((3, 2, 4)), jnp.ones((2, 2, 4))]},
            r"with the same L .*; got float32 \(3, 2, 4\), float32",
        ),
        ({"weights": [jnp.ones((3, 2, 4), "bfloat16")]}, r"of x's dtype .*; got bfloat16"),
        ({"layer": jnp.zeros(1, int)}, r"layer must be one integer; got int32 \(1,\)"),
        ({"layer": 0.0}, r"layer must be one integer; got float32 \(\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        stacked_linear(**{"x": jnp.ones((1, 4)), "weights": [jnp.ones((3, 2, 4))], "layer": 0} | changes)

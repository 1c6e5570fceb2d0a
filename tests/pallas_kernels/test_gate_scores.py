"""`score_blocks`: its implementations, and errors for invalid arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import score_blocks
from pallas_kernels.devices import assume_hopper
from pallas_kernels.gate_scores.cases import REAL, Case
from tests.pallas_kernels.suites import gate_scores as suite
from tests.pallas_kernels.suites.comparison import assert_lowers_for_cuda


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
    """Except the stores at the edge of scores that are not whole tiles."""

    implementation = "mosaic_gpu"


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(score_blocks, case)


@pytest.mark.parametrize(
    ("rows", "dim", "chosen"), [(1024, 64, True), (1023, 64, False), (1024, 32, False)], ids=["many", "few", "narrow"]
)
def test_the_kernel_is_chosen_for_many_scores(rows: int, dim: int, chosen: bool):
    x = jax.ShapeDtypeStruct((1, rows, 2, dim), jnp.float32)
    with assume_hopper():
        lowered = jax.jit(score_blocks).trace(x, x).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == chosen


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 64, 2, 32), "takes vectors of 64 and 128 elements; got 32"),
        ((1, 63, 2, 64), "takes 64 queries or more; got 63"),
    ],
)
def test_mosaic_gpu_refuses(shape: tuple[int, ...], message: str):
    x = jnp.ones(shape)
    with assume_hopper(), pytest.raises(NotImplementedError, match=message):
        score_blocks(x, x, implementation="mosaic_gpu")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": jnp.ones((1, 4, 4, 8), "bfloat16")}, r"queries must be float32 .*; got bfloat16 \(1, 4, 4, 8\)"),
        ({"keys": jnp.ones((4, 2, 8))}, r"keys float32 \[B, Sb, K, C\]; got .* float32 \(4, 2, 8\)"),
        (
            {"keys": jnp.ones((2, 4, 2, 8))},
            r"must agree in B and C, and H must be a multiple of K; got .* \(2, 4, 2, 8\)",
        ),
        ({"keys": jnp.ones((1, 4, 2, 16))}, r"must agree in B and C"),
        ({"keys": jnp.ones((1, 4, 3, 8))}, r"H must be a multiple of K; got \(1, 4, 4, 8\) and \(1, 4, 3, 8\)"),
        ({"keys": jnp.ones((1, 0, 2, 8))}, r"no axis may be empty; got .* \(1, 0, 2, 8\)"),
        ({"row_offset": -1}, r"row_offset must be at least 0; got -1"),
        ({"row_offset": jnp.zeros(1, int)}, r"row_offset must have shape \[\] = \(\); got \(1,\)"),
        ({"row_offset": jnp.zeros(())}, r"row_offset must hold integers; got float32"),
        ({"scale": float("inf")}, r"scale must be a finite number; got inf"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        score_blocks(**{"queries": jnp.ones((1, 4, 4, 8)), "keys": jnp.ones((1, 4, 2, 8))} | changes)  # pyright: ignore

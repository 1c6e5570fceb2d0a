"""`sparse_decode_attention`: its implementations, their memory, and errors for invalid arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices, sparse_decode_attention
from pallas_kernels.cases import Heads
from pallas_kernels.sparse_decode import mosaic_gpu
from pallas_kernels.sparse_decode.cases import HALF, REAL, Case
from tests.pallas_kernels.suites import sparse_decode as suite
from tests.pallas_kernels.suites.comparison import (
    assert_left_to_xla,
    assert_lowers_for_cuda,
    memory,
    shapes,
    slow_but,
)

LOWERED = ("qwen3-4b-b8-128k", "half-no-groups", "half-group-of-12", "half-ragged")


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Conformance):
    implementation = "xla"


@pytest.mark.gpu
class TestMosaicGpu(suite.HalfPrecision):
    implementation = "mosaic_gpu"


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
class TestMosaicGpuInterpreted(suite.HalfPrecision):
    """Without a GPU, and with detection of races between copies and reads."""

    implementation = "mosaic_gpu"


@pytest.mark.parametrize("case", slow_but([*REAL, *HALF], *LOWERED), ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(sparse_decode_attention, case, return_lse=True)


@pytest.mark.parametrize(
    ("lists", "tiles", "parts"),
    [(8, 51, 64), (64, 205, 16), (128, 52, 8), (512, 52, 2), (1024, 52, 1), (1, 1, 1), (1, 3, 4), (1, 2048, 64)],
)
def test_mosaic_gpu_splits_lists(lists: int, tiles: int, parts: int):
    assert mosaic_gpu.choose_parts(lists, tiles) == parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 and float16; got float32"),
        ({"heads": Heads(2, 1, 32)}, "takes head dims 64 and 128; got 32"),
        ({"heads": Heads(65, 1, 64)}, "takes groups of at most 64 query heads; got 65"),
        ({"num_keys": 60}, "takes caches of a multiple of 8 tokens; got 60"),
    ],
)
def test_mosaic_gpu_leaves_the_rest_to_xla(changes: dict[str, Any], message: str):
    assert_left_to_xla(
        sparse_decode_attention, dataclasses.replace(Case("small", Heads(2, 1, 64), 64), **changes), message
    )


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_shapes(case: Case):
    arguments, _ = shapes(case)
    out, lse = jax.eval_shape(lambda x: sparse_decode_attention(**x, return_lse=True), arguments)
    assert out.shape == arguments["q"].shape and out.dtype == arguments["q"].dtype
    assert lse.shape == out.shape[:2] and lse.dtype == jnp.float32


@pytest.mark.cpu
def test_xla_never_copies_the_cache():
    arguments, _ = shapes(next(case for case in REAL if case.name == "qwen3-4b-b8-128k"))
    used = memory(lambda x: sparse_decode_attention(**x, implementation="xla"), arguments)
    assert used.temp_size_in_bytes < used.argument_size_in_bytes / 1000


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 1, 4, 64))}, r"sparse_decode_attention: q must be \[B, H, D\]; got shape \(2, 1, 4, 64\)"),
        (
            {"blocks": BlockIndices(jnp.ones((2, 4), "int32"), jnp.zeros((2, 4, 3), "int32"), 16)},
            r"blocks.counts must have shape \[B, K\] = \(2, 2\); got \(2, 4\)",
        ),
        ({"lengths": jnp.ones(2)}, r"lengths must hold integers; got float32"),
        ({"lengths": jnp.ones((), int)}, r"lengths must have shape \[B\] = \(2,\); got \(\)"),
        (
            {"cache_rows": jnp.zeros(3, int)},
            r"cache_rows must have shape \[B\] = \(2,\); got \(3,\)",
        ),
        ({"cache_rows": jnp.array([0, 2])}, r"cache_rows must lie in \[0, 1\], the rows of k and v; got 2"),
        (
            {"cache_rows": jnp.zeros(2, int), "q": np.ones((2, 4, 32), np.float32)},
            r"q and k must agree in D; got q \(2, 4, 32\) and k \(2, 40, 2, 64\)",
        ),
        ({"scale": float("inf")}, r"scale must be a finite number; got inf"),
        ({"implementation": "flash"}, r"implementation must be None or one of .*; got 'flash'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    k = np.ones((2, 40, 2, 64), np.float32)
    blocks = BlockIndices(jnp.ones((2, 2), "int32"), jnp.zeros((2, 2, 3), "int32"), 16)
    arguments: dict[str, Any] = {"q": np.ones((2, 4, 64), np.float32), "k": k, "v": k, "blocks": blocks}
    arguments |= {"lengths": jnp.ones(2, int)} | changes
    with pytest.raises(ValueError, match=message):
        sparse_decode_attention(**arguments)

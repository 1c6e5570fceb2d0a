"""`sparse_decode_attention`: its implementations, the memory they take, and what it says to wrong calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices, sparse_decode_attention
from pallas_kernels.sparse_decode.cases import REAL, Case
from tests.pallas_kernels import suite_decode as suite
from tests.pallas_kernels.comparison import memory, shapes


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Conformance):
    implementation = "xla"


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

"""`select_blocks`: its implementations, and what it says to wrong calls."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import select_blocks
from pallas_kernels.gate_selection.cases import REAL, Case
from tests.pallas_kernels import suite_selection as suite
from tests.pallas_kernels.comparison import shapes


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Conformance):
    implementation = "xla"


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_shapes(case: Case):
    arguments, static = shapes(case)
    blocks = jax.eval_shape(lambda x: select_blocks(**x, **static), arguments)
    assert blocks.counts.shape == case.shape[:-1]
    assert blocks.indices.shape == (*case.shape[:-1], case.max_blocks or case.shape[-1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": jnp.zeros((2, 3, 5), "bfloat16")}, r"logits must be a float32 array .*; got bfloat16 \(2, 3, 5\)"),
        ({"logits": jnp.zeros(5)}, r"logits must be a float32 array \[..., R, Sb\]; got float32 \(5,\)"),
        ({"block_size": 8}, r"select_blocks: block_size must be one of .* tokens; got 8"),
        ({"top_k": 2, "max_blocks": 3}, r"at most one of threshold, top_k and max_blocks .*; got top_k and max_blocks"),
        ({"threshold": 0.1, "top_k": 2}, r"got threshold and top_k"),
        ({"top_k": 0}, r"top_k must be at least 1 block; got 0"),
        ({"max_blocks": 0}, r"max_blocks must be at least 1 block; got 0"),
        ({"width": 0}, r"width must be at least 1 block; got 0"),
        ({"threshold": 1.5}, r"threshold is compared with a softmax and must lie from 0 to 1; got 1.5"),
        ({"threshold": -0.1}, r"must lie from 0 to 1; got -0.1"),
        ({"threshold": jnp.zeros(5)}, r"threshold must broadcast to \[..., R, 1\] = \(2, 3, 1\); got \(5,\)"),
        ({"keep": jnp.zeros((3, 5), int)}, r"keep must be bool; got int32"),
        (
            {"keep": jnp.zeros((2, 1, 1, 1), bool)},
            r"keep must broadcast to \[..., R, Sb\] = \(2, 3, 5\); got \(2, 1, 1, 1\)",
        ),
        ({"implementation": "numpy"}, r"implementation must be None or one of .*; got 'numpy'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        select_blocks(**{"logits": jnp.zeros((2, 3, 5)), "block_size": 64} | changes)


def test_refuses_a_width_that_loses_blocks():
    with pytest.raises(ValueError, match=r"no row may keep more than max_blocks=2 blocks; got a row with 3"):
        select_blocks(jnp.zeros((1, 3)), block_size=64, width=2, implementation="reference")

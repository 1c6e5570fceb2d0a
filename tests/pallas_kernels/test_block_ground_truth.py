"""`attention_with_block_scores`: its implementations, their memory, and errors for invalid arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_with_block_scores
from pallas_kernels.block_ground_truth.cases import REAL, Case
from pallas_kernels.cases import Heads
from tests.pallas_kernels.suites import block_ground_truth as suite
from tests.pallas_kernels.suites.comparison import (
    assert_left_to_xla,
    assert_lowers_for_cuda,
    memory,
    shapes,
    slow_but,
)

# One of each kind: lengths, packed sequences, wide blocks with both kinds of scores, a chunk by mass.
LOWERED = (
    "llama-3.1-8b-8k-ragged-batch",
    "qwen3-4b-32k-packed",
    "llama-3.1-8b-8k-blocks-of-128",
    "qwen3-4b-64k-chunk-by-mass",
)


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


@pytest.mark.parametrize("case", slow_but(REAL, *LOWERED), ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(attention_with_block_scores, case)


@pytest.mark.parametrize("block_size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_mosaic_gpu_lowers_for_a_million_tokens(block_size: int):
    case = Case("million", Heads(2, 1, 128), 2**20, num_queries=8192, block_size=block_size, token_scores=True)
    assert_lowers_for_cuda(attention_with_block_scores, case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 and float16; got float32"),
        ({"heads": Heads(2, 1, 32)}, "takes head dims 64 and 128; got 32"),
        ({"block_size": 32}, "takes blocks of 64 and 128 tokens; got 32"),
        ({"length": 2**20 + 64, "num_queries": 64}, "takes at most 16384 key blocks; got 16385"),
    ],
)
def test_mosaic_gpu_leaves_the_rest_to_xla(changes: dict[str, Any], message: str):
    assert_left_to_xla(
        attention_with_block_scores, dataclasses.replace(Case("small", Heads(2, 1, 64), 64), **changes), message
    )


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_shapes(case: Case):
    arguments, static = shapes(case)
    got = jax.eval_shape(lambda x: attention_with_block_scores(**x, **static), arguments)
    (batch, length, heads, _), num_blocks = arguments["q"].shape, -(-case.length // case.block_size)
    rows = -(-length // case.block_size)
    assert got.output.shape == arguments["q"].shape and got.lse.shape == (batch, length, heads)
    assert not case.block_scores or got.block_scores.shape == (batch, heads, rows, num_blocks)
    assert not case.token_scores or got.token_scores.shape == (batch, case.heads.kv_heads, length, num_blocks)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["llama-3.1-8b-64k", "qwen3-4b-32k-packed", "llama-3.1-8b-64k-by-mass"])
def test_xla_needs_less_memory_than_its_inputs(name: str):
    """Although a T x S array would take hundreds of GB for all heads."""
    arguments, static = shapes(next(case for case in REAL if case.name == name))
    used = memory(lambda x: attention_with_block_scores(**x, **static, implementation="xla"), arguments)
    assert used.temp_size_in_bytes < used.argument_size_in_bytes


def call(**changes: Any) -> Any:
    arguments = {"q": np.ones((2, 40, 4, 64), np.float32), "k": np.ones((2, 40, 2, 64), np.float32)}
    return attention_with_block_scores(**arguments | {"v": arguments["k"]} | changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 40, 256))}, r"attention_with_block_scores: q must be \[B, T, H, D\]"),
        (dict.fromkeys("kv", jnp.zeros((2, 39, 2, 64), "float32")), r"S must be at least T, .*; got T=40 and S=39"),
        ({"query_offset": 64}, r"query_offset must be a multiple of block_size=64 from 0 to S - T = 0; got 64"),
        (
            dict.fromkeys("kv", jnp.zeros((2, 140, 2, 64), "float32")) | {"query_offset": 32},
            r"a multiple of block_size=64 from 0 to S - T = 100; got 32",
        ),
        ({"query_offset": jnp.zeros(2, int)}, r"query_offset must have shape \[\] = \(\); got \(2,\)"),
        ({"query_offset": jnp.zeros(())}, r"query_offset must hold integers; got float32"),
        ({"query_offset": 0.0}, r"query_offset must hold integers; got float32"),
        ({"query_offset": jnp.array(64)}, r"query_offset must be a multiple of .* from 0 to S - T = 0; got 64"),
        ({"block_size": 48}, r"block_size must be one of \(16, 32, 64, 128\) tokens; got 48"),
        ({"lengths": jnp.ones(2, int), "segment_ids": jnp.ones((2, 40), int)}, r"must not both be given; got both"),
        ({"lengths": jnp.array([40, 41])}, r"lengths must lie in \[0, 40\], the keys of a sequence; got 41"),
        ({"lengths": jnp.array([-1, 40])}, r"lengths must lie in \[0, 40\], the keys of a sequence; got -1"),
        (
            {"block_size": 16, "segment_ids": jnp.array([[1] * 40, [1] * 16 + [0] * 8 + [2] * 16])},
            r"must start at multiples of block_size=16; got one that starts at 24 in row 1. Pad the sequence before it by id 0",
        ),
        ({"lengths": jnp.ones(3, int)}, r"lengths must have shape \[B\] = \(2,\); got \(3,\)"),
        ({"segment_ids": jnp.ones((2, 40))}, r"segment_ids must hold integers; got float32"),
        ({"segment_ids": jnp.ones((2, 41), int)}, r"segment_ids must have shape \[B, S\] = \(2, 40\); got \(2, 41\)"),
        ({"scale": float("inf")}, r"scale must be a finite number; got inf"),
        ({"statistic": "sum"}, r"statistic must be one of \('max', 'mass'\); got 'sum'"),
        ({"implementation": "cudnn"}, r"implementation must be None or one of .*; got 'cudnn'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_refuses_a_gradient(name: str):
    x = jnp.ones((2, 40, 4, 64))
    qkv = dict.fromkeys("qkv", x)
    with pytest.raises(
        NotImplementedError, match=r"must not be differentiated, .* got a gradient\. .* jax.lax.stop_gradient"
    ):
        jax.grad(lambda x: call(**qkv | {name: x}).output.sum())(x)

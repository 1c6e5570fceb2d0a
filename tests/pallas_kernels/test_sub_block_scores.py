"""`score_sub_blocks`: its implementations, and errors for invalid arguments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import score_blocks, score_sub_blocks
from pallas_kernels.sub_block_scores import xla
from pallas_kernels.sub_block_scores.cases import DECODE, REAL, Case
from tests.pallas_kernels.suites import sub_block_scores as suite
from tests.pallas_kernels.suites.comparison import KEY, memory, shapes


class TestReference(suite.JoinsHeads):
    implementation = "reference"

    def test_one_vector_each_is_the_softmax_of_block_scores(self):
        arguments = Case("plain", 4, 2, 64, 20, 20).arguments(KEY)
        scores = score_blocks(arguments["queries"], arguments["keys"], implementation="reference")
        truth = jax.nn.log_softmax(jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -jnp.inf))
        np.testing.assert_allclose(self.run(**arguments), truth, atol=2e-6)


class TestXla(suite.JoinsHeads, suite.Conformance):
    implementation = "xla"

    def test_gradients_where_heads_join(self):
        (case,) = (case for case in suite.JOINED if case.name == "tokens")
        suite.compare_gradients(case.arguments(KEY), "xla", self.gradient_error)

    def test_chunks_of_rows(self, monkeypatch: pytest.MonkeyPatch):
        """Three chunks of five rows for 14 rows, the last of which has two query vectors."""
        monkeypatch.setattr(xla, "ELEMENTS", 2 * 4 * 57 * 5)
        arguments = Case("chunks", 2, 1, 64, 54, 57, 4, 4).arguments(KEY)
        suite.assert_accurate(self.run(**arguments), arguments, self.error)
        suite.compare_gradients(arguments, "xla", self.gradient_error)


@pytest.mark.parametrize("gradient", [False, True], ids=["scores", "gradients"])
def test_memory_beside_arguments_and_results_is_that_of_a_chunk(gradient: bool):
    arguments, static = shapes(REAL[0])
    score = functools.partial(score_sub_blocks, **static, implementation="xla")
    function = jax.grad(lambda x: score(**x).sum(), allow_int=True) if gradient else lambda x: score(**x)
    chunk, vectors = 4 * xla.ELEMENTS, 4 * sum(arguments[name].size for name in ("queries", "keys"))
    results = 0 if gradient else 4 * 32 * 512 * 512
    assert memory(function, arguments).temp_size_in_bytes <= 4 * chunk + 4 * vectors + results


def test_decoding_makes_no_copy_of_the_keys():
    arguments, static = shapes(DECODE)
    score = functools.partial(score_sub_blocks, **static, implementation="xla")
    products = 4 * DECODE.batch * DECODE.heads * DECODE.keys
    assert memory(lambda x: score(**x), arguments).temp_size_in_bytes <= 4 * products < 2 * arguments["keys"].size


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": jnp.ones((1, 4, 4, 8), "bfloat16")}, r"queries must be float32 .*; got bfloat16 \(1, 4, 4, 8\)"),
        ({"keys": jnp.ones((1, 8, 2, 8), "float16")}, r"keys float32 or bfloat16 .*; got .* float16 \(1, 8, 2, 8\)"),
        ({"keys": jnp.ones((8, 2, 8))}, r"\[B, Sw, K, C\]; got .* float32 \(8, 2, 8\)"),
        ({"keys": jnp.ones((2, 8, 2, 8))}, r"must agree in B and C, .* \(2, 8, 2, 8\)"),
        ({"keys": jnp.ones((1, 8, 3, 8))}, r"H must be a multiple of K; got \(1, 4, 4, 8\) and \(1, 8, 3, 8\)"),
        ({"keys": jnp.ones((1, 0, 2, 8))}, r"no axis may be empty; got .* \(1, 0, 2, 8\)"),
        ({"seen": jnp.zeros((1, 4, 2))}, r"seen must hold integers; got float32"),
        ({"seen": jnp.zeros((2, 4, 2), int)}, r"seen must have shape \[B or 1, Tu, 2\] = \(1, 4, 2\); got \(2, 4, 2\)"),
        ({"seen": 3}, r"seen must be an array; got int"),
        ({"queries_per_row": 0}, r"queries_per_row must be an integer of at least 1; got 0"),
        ({"keys_per_block": 2.0}, r"keys_per_block must be an integer of at least 1; got 2.0"),
        ({"join": "avg"}, r"join must be one of \('sum', 'max'\); got 'avg'"),
        ({"heads": "sum"}, r"heads must be one of \('each', 'max', 'mean'\); got 'sum'"),
        ({"scale": float("inf")}, r"scale must be a finite number; got inf"),
        ({"implementation": "triton"}, r"implementation must be None or one of .*; got 'triton'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    arrays = {"queries": jnp.ones((1, 4, 4, 8)), "keys": jnp.ones((1, 8, 2, 8)), "seen": jnp.zeros((1, 4, 2), int)}
    with pytest.raises(ValueError, match=message):
        score_sub_blocks(**arrays | {"queries_per_row": 2, "keys_per_block": 4} | changes)  # pyright: ignore

"""`score_sub_blocks`: its implementations, and errors for invalid arguments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import score_blocks, score_sub_blocks
from pallas_kernels.devices import assume_hopper
from pallas_kernels.sub_block_scores import kernel, xla
from pallas_kernels.sub_block_scores.cases import DECODE, FLOAT32_DECODE, REAL, TINY, Case
from tests.pallas_kernels.suites import sub_block_scores as suite
from tests.pallas_kernels.suites.comparison import KEY, assert_lowers_for_cuda, memory, shapes, slow_but


class TestReference(suite.Definition):
    implementation = "reference"

    def test_one_vector_each_is_the_softmax_of_block_scores(self):
        arguments = Case("plain", 4, 2, 64, 20, 20).arguments(KEY)
        scores = score_blocks(arguments["queries"], arguments["keys"], implementation="reference")
        truth = jax.nn.log_softmax(jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -jnp.inf))
        np.testing.assert_allclose(self.run(**arguments), truth, atol=2e-6)


class TestXla(suite.Conformance):
    implementation = "xla"

    def test_gradients_where_heads_join(self):
        (case,) = (case for case in TINY if case.name == "tokens")
        suite.compare_gradients(case.arguments(KEY), "xla", self.gradient_error)

    def test_float32_keys_while_decoding(self):
        arguments = FLOAT32_DECODE.arguments(KEY)
        suite.assert_accurate(self.run(**arguments), arguments, self.error)

    @pytest.mark.parametrize("of_keys", [None, 0], ids=["keys of all", "keys of each"])
    def test_tokens_mapped(self, of_keys: int | None):
        """A window's tokens under `jax.vmap`, as evaluation scores them, whether they share their keys or not."""
        arguments = FLOAT32_DECODE.arguments(KEY)
        many = {name: jnp.stack([x, 2 * x]) for name, x in arguments.items() if name in ("queries", "keys")}
        keys = arguments["keys"] if of_keys is None else many["keys"]
        run = functools.partial(self.run, **{name: x for name, x in arguments.items() if name not in many})
        scores = jax.vmap(lambda q, k: run(queries=q, keys=k), (0, of_keys))(many["queries"], keys)
        for queries, own, found in zip(
            many["queries"], jnp.broadcast_to(keys, many["keys"].shape), scores, strict=True
        ):
            suite.assert_accurate(found, arguments | {"queries": queries, "keys": own}, self.error)

    def test_chunks_of_rows(self, monkeypatch: pytest.MonkeyPatch):
        """Three chunks of five rows for 14 rows, the last of which has two query vectors."""
        monkeypatch.setattr(xla, "ELEMENTS", 2 * 4 * 57 * 5)
        arguments = Case("chunks", 2, 1, 64, 54, 57, 4, 4).arguments(KEY)
        suite.assert_accurate(self.run(**arguments), arguments, self.error)
        suite.compare_gradients(arguments, "xla", self.gradient_error)


class MosaicGpu(suite.Conformance):
    """Products of float16 values: the error that README.md states."""

    implementation = "mosaic_gpu"
    error = 2**-9


@pytest.mark.gpu
class TestMosaicGpu(MosaicGpu):
    pass


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
class TestMosaicGpuInterpreted(MosaicGpu):
    """Except the stores at the edge of scores that are not whole tiles."""

    @pytest.mark.parametrize("case", slow_but(TINY, "packed", "decode-halves"), ids=lambda case: case.name)
    def test_errs_no_more_than_stated(self, case: Case):
        super().test_errs_no_more_than_stated(case)

    def test_small_ctas(self, monkeypatch: pytest.MonkeyPatch):
        """As where there are many; the second half of them in reverse."""
        monkeypatch.setattr(kernel, "MULTIPROCESSORS", 2)
        arguments = Case("small-ctas", 2, 1, 64, 270, 267, 4, 4).arguments(KEY)
        suite.assert_accurate(self.run(**arguments), arguments, self.error)


@pytest.mark.parametrize(("dim", "ctas", "warpgroups"), [(64, 1024, 3), (64, 128, 4), (128, 1024, 4)])
def test_many_ctas_are_small(dim: int, ctas: int, warpgroups: int):
    assert kernel.Tuning.of(4, dim, 4, ctas) == kernel.Tuning(warpgroups)


@pytest.mark.parametrize("case", slow_but((*REAL, DECODE), "llama-3.1-8b-32k", DECODE.name), ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(score_sub_blocks, case)


LARGE = Case("large", 32, 8, 64, 256, 256, 4, 4)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"heads": 1, "kv_heads": 1}, False),
        ({"dim": 32}, False),
        ({"per_block": 32}, False),
        ({"vectors": 1, "keys": 16384, "per_row": 1, "dtype": "bfloat16"}, True),
        ({"vectors": 1, "keys": 16384, "per_row": 1}, False),
    ],
    ids=["many", "few", "narrow", "fine", "decode", "decode-float32"],
)
def test_the_kernel_is_chosen_where_it_pays(changes: dict[str, Any], chosen: bool):
    arguments, static = shapes(dataclasses.replace(LARGE, **changes))
    with assume_hopper():
        traced = jax.make_jaxpr(functools.partial(score_sub_blocks, **static))(**arguments)
    assert ("wgmma" in str(traced)) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "takes vectors of 64 and 128 elements; got 32"),
        ({"per_block": 32}, "takes 1, 2, 4, 8 or 16 key vectors per block; got 32"),
        ({"vectors": 4}, "takes more than 16 query vectors per key head, or one for all heads; got 4 of 4 heads"),
        ({"per_row": 16, "dim": 128}, "takes at most 11 query vectors of 128 elements per row, .*; got 16"),
        ({"heads": 512, "heads_join": "max"}, "takes at most 24 query vectors of 64 elements .*; got 256"),
        ({"vectors": 1}, "takes bfloat16 keys for one query vector; got float32"),
        ({"vectors": 1, "dtype": "bfloat16", "keys": 252}, "a multiple of 8 blocks of 4 key vectors .*; got 252"),
        ({"vectors": 1, "dtype": "bfloat16", "heads": 512}, "takes at most 128 products per block; got 64 x 4"),
    ],
)
def test_mosaic_gpu_refuses(changes: dict[str, Any], message: str):
    arguments, static = shapes(dataclasses.replace(LARGE, **changes))
    call = functools.partial(score_sub_blocks, **static, implementation="mosaic_gpu")
    with assume_hopper(), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda x: call(**x), arguments)


@pytest.mark.parametrize("gradient", [False, True], ids=["scores", "gradients"])
def test_memory_beside_arguments_and_results_is_that_of_a_chunk(gradient: bool):
    arguments, static = shapes(REAL[0])
    score = functools.partial(score_sub_blocks, **static, implementation="xla")
    function = jax.grad(lambda x: score(**x).sum(), allow_int=True) if gradient else lambda x: score(**x)
    chunk, vectors = 4 * xla.ELEMENTS, 4 * sum(arguments[name].size for name in ("queries", "keys"))
    results = 0 if gradient else 4 * 32 * 512 * 512
    assert memory(function, arguments).temp_size_in_bytes <= 4 * chunk + 4 * vectors + results


def test_decoding_makes_no_copy_of_the_keys():
    """Which a cache keeps by head. Of all layers' keys, XLA may cut out those of one, but not convert them."""
    arguments, static = shapes(DECODE)
    batch, count, heads, dim = arguments.pop("keys").shape
    products, keys = 4 * DECODE.batch * DECODE.heads * DECODE.keys, 2 * batch * count * heads * dim
    row = jax.ShapeDtypeStruct((), "int32")

    def score(x: Any, cache: jax.Array, row: jax.Array | None) -> jax.Array:
        return score_sub_blocks(keys=cache.swapaxes(1, 2), **x, **static, first_row=row, implementation="xla")

    def temporary(layers: int, row: Any) -> int:
        cache = jax.ShapeDtypeStruct((layers * batch, heads, count, dim), "bfloat16")
        return memory(score, arguments, cache, row).temp_size_in_bytes

    assert temporary(1, None) <= 4 * products < keys
    assert temporary(3, row) <= 4 * products + keys


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": jnp.ones((1, 4, 4, 8), "bfloat16")}, r"queries must be float32 .*; got bfloat16 \(1, 4, 4, 8\)"),
        ({"keys": jnp.ones((1, 8, 2, 8), "float16")}, r"keys float32 or bfloat16 .*; got .* float16 \(1, 8, 2, 8\)"),
        ({"keys": jnp.ones((8, 2, 8))}, r"\[P, Sw, K, C\]; got .* float32 \(8, 2, 8\)"),
        ({"keys": jnp.ones((2, 8, 2, 8))}, r"must agree in B, unless first_row says .*; got .* \(2, 8, 2, 8\)"),
        ({"keys": jnp.ones((2, 8, 2, 8)), "first_row": 2}, r"first_row must lie from 0 to P - B = 1; got 2"),
        ({"first_row": jnp.zeros(())}, r"first_row must hold integers; got float32"),
        ({"first_row": 0.0}, r"first_row must hold integers; got float32"),
        ({"first_row": jnp.array(1)}, r"first_row must lie from 0 to P - B = 0; got 1"),
        ({"keys": jnp.ones((1, 8, 2, 4))}, r"must agree in C, .* \(1, 8, 2, 4\)"),
        ({"keys": jnp.ones((1, 8, 3, 8))}, r"H must be a multiple of K; got \(1, 4, 4, 8\) and \(1, 8, 3, 8\)"),
        ({"keys": jnp.ones((1, 0, 2, 8))}, r"no axis may be empty; got .* \(1, 0, 2, 8\)"),
        ({"seen": jnp.zeros((1, 4, 2))}, r"seen must hold integers; got float32"),
        ({"seen": jnp.zeros((2, 4, 2), int)}, r"seen must have shape \[B or 1, Tu, 2\] = \(1, 4, 2\); got \(2, 4, 2\)"),
        ({"seen": 3}, r"seen must be an array; got int"),
        ({"seen": None}, r"seen must be an array; got NoneType"),
        ({"queries_per_row": 0}, r"queries_per_row must be an integer of at least 1; got 0"),
        ({"keys_per_block": 2.0}, r"keys_per_block must be an integer of at least 1; got 2.0"),
        ({"keys_per_block": True}, r"keys_per_block must be an integer of at least 1; got True"),
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

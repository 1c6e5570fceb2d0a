"""`select_blocks`: its implementations, and errors for invalid arguments."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import select_blocks
from pallas_kernels.devices import assume_hopper
from pallas_kernels.gate_selection import mosaic_gpu
from pallas_kernels.gate_selection.cases import REAL, TINY, Case
from tests.pallas_kernels.suites import gate_selection as suite
from tests.pallas_kernels.suites.comparison import assert_lowers_for_cuda, assert_same_lists, shapes, slow_but


class TestReference(suite.Definition):
    implementation = "reference"


class TestXla(suite.Conformance):
    implementation = "xla"


@pytest.mark.gpu
class TestMosaicGpu(suite.Conformance):
    implementation = "mosaic_gpu"


OF_EACH_RULE = ("prefill-top-k-ties", "decode-budget-ties", "decode-mass", "decode-threshold")


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
class TestMosaicGpuInterpreted(suite.Conformance):
    """Except the code in MLIR, see warp_rows.py."""

    implementation = "mosaic_gpu"

    @pytest.mark.parametrize("case", slow_but(TINY, *OF_EACH_RULE), ids=lambda case: case.name)
    def test_follows_the_rule(self, case: Case):
        super().test_follows_the_rule(case)


@pytest.fixture(scope="class")
def quartered() -> Iterator[None]:
    """All rows are quartered, as if a warp's registers held none."""
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()  # of programs whose rows are not
        patch.setattr(mosaic_gpu, "WARP_KEY_BLOCKS", 0)
        yield
        jax.clear_caches()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.usefixtures("quartered", "interpreted")
class TestMosaicGpuQuartersInterpreted(suite.Conformance):
    """The kernel for rows that are too long for a warp, on short ones."""

    implementation = "mosaic_gpu"


@pytest.mark.gpu
@pytest.mark.usefixtures("quartered")
class TestMosaicGpuQuarters(suite.Conformance):
    """As it runs on GPUs, code in MLIR included."""

    implementation = "mosaic_gpu"


def quartered_call(monkeypatch: pytest.MonkeyPatch, columns: int) -> tuple[dict[str, Any], np.ndarray]:
    """Rows with ties over all quarters, of a length of their own, with kept blocks that exceed a cap in one of them; and their logits."""
    monkeypatch.setattr(mosaic_gpu, "WARP_KEY_BLOCKS", 0)
    rng = np.random.default_rng(0)
    logits = np.round(2 * rng.normal(size=(2, columns))).astype(np.float32)
    keep = rng.random((2, columns)) < np.array([[0.01], [0.2]])
    visible = np.array([[columns], [columns // 2 + 3]])
    return dict(keep=jnp.asarray(keep), visible=jnp.asarray(visible), block_size=64, max_blocks=20), logits


@pytest.mark.cpu
@pytest.mark.usefixtures("interpreted")
def test_quarters_of_a_row_choose_together(monkeypatch: pytest.MonkeyPatch):
    arguments, logits = quartered_call(monkeypatch, 301)
    got, truth = (
        select_blocks(jnp.asarray(logits), **arguments, implementation=of) for of in ("mosaic_gpu", "reference")
    )
    assert_same_lists(got, truth)


@pytest.mark.slow
def test_quarters_lower_for_cuda(monkeypatch: pytest.MonkeyPatch):
    arguments, logits = quartered_call(monkeypatch, 302)

    def program(x: jax.Array) -> jax.Array:
        return select_blocks(x, **arguments, implementation="mosaic_gpu").indices

    with assume_hopper():
        assert "mosaic_gpu" in jax.jit(program).trace(logits).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("quartered")
class TestQuartersLowerForCuda:
    """Prefill rows see a part of the blocks, decode rows all."""

    @pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
    def test_by_every_rule(self, case: Case):
        assert_lowers_for_cuda(select_blocks, case)


@pytest.mark.slow
def test_rows_of_a_million_tokens_lower_for_cuda():
    assert_lowers_for_cuda(select_blocks, Case("1m-threshold", (1, 2, 8, 16384), threshold=5e-4))


# The largest take as long as all the others together.
LONG = [pytest.param(case, marks=pytest.mark.slow if math.prod(case.shape) > 2**22 else ()) for case in REAL]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(select_blocks, case)


@pytest.mark.parametrize("rule", ["threshold", "mass", "top_k", "max_blocks"])
def test_mosaic_gpu_lowers_for_cuda_under_vmap_and_grad(rule: str):
    def kept(logits: jax.Array, number: jax.Array) -> jax.Array:
        arguments: dict[str, Any] = {rule: number, "implementation": "mosaic_gpu"}
        blocks = select_blocks(logits, **arguments, block_size=64)
        return jnp.where(blocks.counts > 1, logits.sum(-1), 0).sum()

    gradients = jax.jit(jax.vmap(jax.grad(kept)))
    number = jnp.ones((2, 8, 1), "int32" if rule in ("top_k", "max_blocks") else "float32")
    with assume_hopper():
        gradients.trace(jnp.zeros((2, 8, 70)), number).lower(lowering_platforms=("cuda",))


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_mosaic_gpu_under_vmap_runs_once_for_all_lists():
    """Whether an argument has the axis or is shared, the lists are XLA's, and one kernel makes them."""
    logits, keep = jax.random.normal(jax.random.key(0), (5, 1, 3, 40)), jnp.arange(40)[None, None] % 7 == 0
    visible = jnp.arange(20, 25)[:, None, None, None]

    def select(logits: jax.Array, visible: jax.Array, implementation: Any) -> jax.Array:
        blocks = select_blocks(
            logits, mass=0.5, keep=keep, visible=visible, block_size=64, implementation=implementation
        )
        return blocks.to_mask(40)

    got, expected = (
        jax.vmap(functools.partial(select, implementation=of))(logits, visible) for of in ("mosaic_gpu", "xla")
    )
    assert (got == expected).all() and got.shape == logits.shape
    with assume_hopper():
        calls = str(jax.make_jaxpr(jax.vmap(functools.partial(select, implementation="mosaic_gpu")))(logits, visible))
    assert calls.count("grid=(4,)") == 1  # 15 lists, four for each CTA


def test_mosaic_gpu_leaves_longer_rows_to_xla():
    with assume_hopper():
        with pytest.raises(NotImplementedError, match="takes rows of at most 16384 key blocks; got 16385"):
            select_blocks(jnp.zeros((1, 16385)), block_size=64, implementation="mosaic_gpu")
        assert select_blocks(jnp.zeros((1, 16385)), block_size=64).counts[0] == 16385


@pytest.mark.parametrize("rule", ["top_k", "max_blocks"])
def test_long_rows_need_no_sort(rule: str):
    """Of either sign, zeros of both, ties, NaN, and rows with fewer candidates than are asked for."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4160)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2] = np.abs(logits[2])
    logits[3, 30:] = -np.inf
    logits[4] = np.where(rng.random(4160) < 0.5, 0.0, -0.0)
    logits[5, ::3] = np.nan
    number, keep = np.array([[1], [700], [4160], [40], [90], [5000]], np.int32), rng.random((6, 4160)) < 0.01
    for more in ({}, {"keep": jnp.asarray(keep)}):
        settings: dict[str, Any] = {rule: jnp.asarray(number), **more}
        got, truth = (
            select_blocks(jnp.asarray(logits), block_size=64, implementation=of, **settings).to_mask(4160)
            for of in ("xla", "reference")
        )
        np.testing.assert_array_equal(got, truth)
    program = jax.jit(lambda x, n: select_blocks(x, block_size=64, top_k=n, implementation="xla")).lower(logits, number)
    assert "sort" not in program.as_text().replace("indices_are_sorted", "")


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
        (
            {"top_k": 2, "max_blocks": 3},
            r"at most one of threshold, mass, top_k and max_blocks .*; got top_k and max_blocks",
        ),
        ({"threshold": 0.1, "mass": 0.5, "top_k": 2}, r"got threshold and mass and top_k"),
        ({"top_k": 0}, r"top_k must be at least 1 block; got 0"),
        ({"max_blocks": 0}, r"max_blocks must be at least 1 block; got 0"),
        ({"width": 0}, r"width must be an integer of at least 1; got 0"),
        ({"width": 3.0}, r"width must be an integer of at least 1; got 3.0"),
        ({"block_size": 64.0}, r"block_size must be one of \(16, 32, 64, 128\) tokens; got 64.0"),
        ({"logits": jnp.zeros((2, 3, 0))}, r"no axis may be empty; got \(2, 3, 0\)"),
        ({"threshold": 1.5}, r"threshold must lie from 0 to 1, as softmax does; got 1.5"),
        ({"threshold": -0.1}, r"must lie from 0 to 1, as softmax does; got -0.1"),
        ({"mass": 0}, r"mass must be above 0 and at most 1; got 0"),
        ({"mass": 1.01}, r"mass must be above 0 and at most 1; got 1.01"),
        ({"mass": jnp.array([[1.0], [0.0], [0.5]])}, r"mass must be above 0 and at most 1; got 0.0"),
        ({"threshold": np.float32("nan")}, r"threshold must lie from 0 to 1, as softmax does; got nan"),
        ({"threshold": jnp.full((3, 1), jnp.nan)}, r"threshold must lie from 0 to 1, as softmax does; got nan"),
        ({"threshold": "0.1"}, r"threshold must hold numbers; got <U3"),
        ({"top_k": np.int64(0)}, r"top_k must be at least 1 block; got 0"),
        ({"top_k": True}, r"top_k must hold integers; got bool"),
        ({"max_blocks": jnp.array([[2], [0], [1]])}, r"max_blocks must be at least 1 block; got 0"),
        ({"mass": jnp.ones((3, 5))}, r"mass must broadcast to \[..., R, 1\] = \(2, 3, 1\); got \(3, 5\)"),
        ({"top_k": jnp.ones((3, 1))}, r"top_k must hold integers; got float32"),
        ({"max_blocks": jnp.ones((4, 1), int)}, r"max_blocks must broadcast to .* = \(2, 3, 1\); got \(4, 1\)"),
        ({"threshold": jnp.zeros(5)}, r"threshold must broadcast to \[..., R, 1\] = \(2, 3, 1\); got \(5,\)"),
        ({"keep": jnp.zeros((3, 5), int)}, r"keep must be bool; got int32"),
        (
            {"keep": jnp.zeros((2, 1, 1, 1), bool)},
            r"keep must broadcast to \[..., R, Sb\] = \(2, 3, 5\); got \(2, 1, 1, 1\)",
        ),
        ({"visible": jnp.ones((3, 1))}, r"visible must hold integers; got float32"),
        ({"visible": jnp.ones((3, 5), int)}, r"visible must broadcast to .* = \(2, 3, 1\); got \(3, 5\)"),
        ({"implementation": "numpy"}, r"implementation must be None or one of .*; got 'numpy'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        select_blocks(**{"logits": jnp.zeros((2, 3, 5)), "block_size": 64} | changes)


def test_refuses_a_width_that_loses_blocks():
    with pytest.raises(ValueError, match=r"no row may keep more than max_blocks=2 blocks; got a row with 3"):
        select_blocks(jnp.zeros((1, 3)), block_size=64, width=2, implementation="reference")

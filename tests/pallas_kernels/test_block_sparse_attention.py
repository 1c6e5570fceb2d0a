"""`block_sparse_attention`: its implementations, their memory, and errors for invalid arguments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockIndices, block_sparse_attention
from pallas_kernels.backends import Implementation
from pallas_kernels.block_sparse_attention import mosaic_gpu
from pallas_kernels.block_sparse_attention.cases import REAL, Case
from pallas_kernels.block_sparse_attention.gradients import key_gradients, transposed
from pallas_kernels.block_sparse_attention.gradients.mosaic_gpu import key_order
from pallas_kernels.block_sparse_attention.gradients.transposed import listed_by
from pallas_kernels.cases import Heads
from pallas_kernels.sparse_rows import Tiling
from tests.pallas_kernels.suites import block_sparse_attention as suite
from tests.pallas_kernels.suites.comparison import (
    KEY,
    assert_left_to_xla,
    assert_lowers_for_cuda,
    assert_within_rounding,
    memory,
    shapes,
    slow_but,
    with_fillers,
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


# One for each kernel, a batch and a chunk.
LOWERED = [
    f"llama-3.1-8b-{of}" for of in ("32k", "32k-dense", "32k-group-lists", "32k-128", "8k-ragged-batch", "32k-chunk")
]


@pytest.mark.parametrize("case", slow_but(REAL, *LOWERED), ids=lambda case: case.name)
def test_mosaic_gpu_lowers_for_cuda(case: Case):
    assert_lowers_for_cuda(block_sparse_attention, case, density=case.density, return_lse=True)


KERNELS: list[dict[str, Any]] = [{}, {"density": 1.0}, {"lists": 1}, {"block_size": 128}]
# In every run each kernel once, by turns with a cache and without.
IN_TURNS = [
    pytest.param(settings, cached, marks=() if cached == number % 2 else pytest.mark.slow)
    for number, settings in enumerate(KERNELS)
    for cached in (False, True)
]


@pytest.mark.parametrize(("settings", "cached"), IN_TURNS, ids=str)
def test_each_kernel_lowers_for_cuda_with_padding(settings: dict[str, Any], cached: bool):
    case = Case("padded", Heads(2, 1, 64), 520, batch=2, lengths=(520, 301), **settings)
    rows = {"cache_rows": jnp.asarray([1, 0])} if cached else {}
    assert_lowers_for_cuda(block_sparse_attention, case, density=case.density, **rows)


@pytest.mark.parametrize(
    "case", slow_but(REAL, "llama-3.1-8b-32k", "llama-3.1-8b-8k-ragged-batch"), ids=lambda case: case.name
)
def test_gradients_lower_for_cuda(case: Case):
    assert_lowers_for_cuda(gradients, case, density=case.density)


@pytest.mark.parametrize(
    "settings", [{"lists": 1}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"block_size": 128}))], ids=str
)
def test_gradients_lower_for_cuda_with_padding(settings: dict[str, Any]):
    case = Case("padded", Heads(2, 1, 64), 523, batch=2, lengths=(520, 301), dtype="float16", **settings)
    assert_lowers_for_cuda(gradients, case)


def gradients(q: jax.Array, k: jax.Array, v: jax.Array, **rest: Any) -> Any:
    """Of the sum of the outputs, in q, k and v."""

    def loss(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q, k, v = qkv
        out = block_sparse_attention(q, k, v, **rest)
        assert isinstance(out, jax.Array)
        return out.astype("float32").sum()

    return jax.grad(loss)((q, k, v))


@pytest.mark.parametrize(("repeat", "num_rows", "num_blocks"), [(1, 5, 3), (1, 40, 7), (2, 33, 40)])
def test_transposed_lists(repeat: int, num_rows: int, num_blocks: int):
    """Bits from the most significant one of each word on; rows that do not count are not there."""
    mask = jax.random.bernoulli(KEY, 0.4, (2, 3, num_rows, num_blocks))
    rows = jnp.arange(num_rows)[None] < jnp.asarray([[num_rows], [num_rows - 2]])
    blocks = with_fillers(BlockIndices.from_mask(mask, block_size=64), -7)
    words = np.asarray(listed_by(blocks, rows, num_key_blocks=num_blocks, repeat=repeat)).view(np.uint32)
    assert words.shape == (2, 3, num_blocks, -(-num_rows * repeat // 32))
    bits = (words[..., None] >> np.arange(31, -1, -1, dtype=np.uint32)) & 1
    bits = bits.reshape(*words.shape[:3], -1)
    truth = np.asarray(mask & rows[:, None, :, None]).repeat(repeat, axis=2).swapaxes(2, 3)
    np.testing.assert_array_equal(bits[..., : num_rows * repeat], truth)
    assert not bits[..., num_rows * repeat :].any()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("settings", [{}, {"lists": 1}], ids=str)
def test_columns_of_several_words(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """As those of long sequences, but of two bits each; some words are empty."""
    for module in (transposed, key_gradients):
        monkeypatch.setattr(module, "WORD", 2)
    case = Case("words", Heads(3, 1, 64), 450, density=0.3, **settings)
    jax.clear_caches()  # of programs with whole words
    suite.compare_gradients(case, "mosaic_gpu")
    jax.clear_caches()


def test_long_columns_start_first():
    """Those of attention sinks; all others in the order of their heads."""
    counts = jnp.asarray([[[900, 20, 10, 5], [12, 800, 10, 4]]] * 2)
    order = key_order(counts.at[1].set(9))
    assert order.tolist() == [0, 5, 1, 2, 3, 4, 6, 7, *range(8, 16)]


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"lists": 1}, marks=pytest.mark.slow), {"block_size": 128}], ids=str
)
def test_each_kernel_that_skips_lowers_for_cuda(settings: dict[str, Any]):
    case = Case("skips", Heads(2, 1, 128), 520, batch=2, lengths=(520, 301), skip_threshold=1e-3, **settings)
    assert_lowers_for_cuda(block_sparse_attention, case, return_kept=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 and float16; got float32"),
        ({"heads": Heads(2, 1, 32)}, "takes head dims 64 and 128; got 32"),
        ({"block_size": 32}, "takes blocks of 64 and 128 tokens; got 32"),
    ],
)
def test_mosaic_gpu_leaves_the_rest_to_xla(changes: dict[str, Any], message: str):
    assert_left_to_xla(
        block_sparse_attention, dataclasses.replace(Case("small", Heads(2, 1, 64), 64), **changes), message
    )


@pytest.mark.parametrize(
    ("heads", "lists", "block_size", "num_key_blocks", "density", "skips", "name"),
    [
        (Heads(32, 8, 128), 32, 64, 512, None, False, "single-warpgroup"),
        (Heads(32, 8, 128), 32, 64, 512, 0.5, False, "single-warpgroup"),
        (Heads(32, 8, 128), 32, 64, 512, 1.0, False, "own-lists"),
        (Heads(32, 8, 128), 8, 64, 512, None, False, "shared-by-heads"),
        (Heads(32, 8, 128), 1, 64, 512, 0.1, False, "shared-by-heads"),
        (Heads(32, 8, 128), 8, 64, 128, 0.1, False, "single-warpgroup"),
        (Heads(28, 4, 128), 4, 64, 512, None, False, "single-warpgroup"),  # 7 heads in a group
        (Heads(32, 8, 128), 8, 128, 256, None, False, "shared-by-queries"),
        (Heads(32, 8, 128), 32, 64, 512, 0.1, True, "own-lists"),
        (Heads(32, 8, 128), 8, 64, 128, 0.1, True, "shared-by-heads"),
    ],
)
def test_mosaic_gpu_chooses_a_kernel(
    heads: Heads, lists: int, block_size: int, num_key_blocks: int, density: float | None, skips: bool, name: str
):
    choice = mosaic_gpu.choose_config(heads.heads, heads.kv_heads, lists, block_size, num_key_blocks, density, skips)
    assert choice is mosaic_gpu.CONFIGS[name]


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_shapes(case: Case):
    arguments, _ = shapes(case)
    out, lse = jax.eval_shape(lambda x: block_sparse_attention(**x, return_lse=True), arguments)
    assert out.shape == arguments["q"].shape and out.dtype == arguments["q"].dtype
    assert lse.shape == out.shape[:3] and lse.dtype == jnp.float32


@pytest.mark.cpu
def test_xla_needs_less_memory_than_its_inputs():
    """At Llama's shape and 32k tokens, where a T x S array would take 137 GB for all heads."""
    case = next(case for case in REAL if case.name == "llama-3.1-8b-32k")
    arguments, _ = shapes(case)
    used = memory(lambda x: block_sparse_attention(**x, implementation="xla"), arguments)
    assert used.temp_size_in_bytes < used.argument_size_in_bytes


@pytest.mark.cpu
def test_xla_backward_needs_no_array_of_all_pairs():
    case = Case("backward", Heads(8, 2, 64), 4096, block_size=16, dtype="float32")
    arguments, _ = shapes(case)
    qkv = {name: arguments.pop(name) for name in ("q", "k", "v")}

    def loss(qkv, arguments):
        out, _ = block_sparse_attention(**qkv, **arguments, return_lse=True, implementation="xla")
        return out.sum()

    used = memory(jax.grad(loss), qkv, arguments)
    assert used.temp_size_in_bytes < 4 * 8 * 4096 * 4096 / 10  # a tenth of one such array


def test_xla_takes_rows_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch):
    """20 rows in chunks of 3, so that the last chunk contains padding."""
    monkeypatch.setattr(Tiling, "rows_per_chunk", lambda *_: 3)
    case = Case("chunks", Heads(4, 2, 64), 70, block_size=16, density=0.5, dtype="float32")
    arguments = case.arguments(KEY)
    qkv = {name: arguments.pop(name) for name in ("q", "k", "v")}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation: Implementation, qkv: dict[str, jax.Array]) -> Any:
        def loss(qkv: dict[str, jax.Array]) -> Any:
            out, lse = block_sparse_attention(**qkv, **arguments, return_lse=True, implementation=implementation)
            return (out * qkv["q"]).sum() + lse.sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(qkv)

    for got, truth in zip(
        jax.tree.leaves(gradients("xla", qkv)), jax.tree.leaves(gradients("reference", qkv)), strict=True
    ):
        assert_within_rounding(got, truth)


def call(**changes: Any) -> Any:
    arguments = {"q": np.ones((2, 40, 4, 64), np.float32), "k": np.ones((2, 40, 2, 64), np.float32)}
    arguments |= {"v": arguments["k"], "blocks": BlockIndices.all_causal(40, 40, block_size=16, batch=2)}
    return block_sparse_attention(**arguments | changes)


def zeros(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(2, 40, 64)}, r"q must be \[B, T, H, D\]; got shape \(2, 40, 64\)"),
        ({"v": zeros(2, 41, 2, 64)}, r"k and v must both be \[B, S, K, D\]; got \(2, 40, 2, 64\) and \(2, 41, 2, 64\)"),
        ({"q": zeros(1, 40, 4, 64)}, r"q and k must agree in B and D; got q \(1, 40, 4, 64\)"),
        ({"q": zeros(2, 40, 4, 32)}, r"q and k must agree in B and D"),
        ({"q": zeros(2, 40, 3, 64)}, r"H must be a multiple of the key/value heads K; got H=3 and K=2"),
        ({"q": zeros(2, 0, 4, 64)}, r"no axis may be empty; got q \(2, 0, 4, 64\)"),
        (
            {"q": zeros(2, 40, 4, 64, dtype="bfloat16")},
            r"must share one dtype out of .*; got bfloat16, float32 and float32",
        ),
        (dict.fromkeys("kvq", zeros(2, 40, 2, 64, dtype="int8")), r"must share one dtype out of .*; got int8"),
        (
            {"blocks": BlockIndices.all_causal(40, 40, block_size=16, batch=2, lists=3)},
            r"blocks.counts must be \[B, Hs, Tb\], one of \(\(2, 1, 3\), \(2, 2, 3\), \(2, 4, 3\)\).*got \(2, 3, 3\)",
        ),
        ({"blocks": BlockIndices.all_causal(60, 40, block_size=16, batch=2)}, r"Tb = ceil\(T / b\)\); got \(2, 1, 4\)"),
        ({"query_offset": 0.5}, r"query_offset must hold integers; got float32"),
        ({"query_offset": jnp.zeros(3, int)}, r"query_offset must have shape \[B\] = \(2,\); got \(3,\)"),
        ({"lengths": jnp.ones(2)}, r"lengths must hold integers; got float32"),
        ({"cache_rows": jnp.zeros(3, int)}, r"cache_rows must have shape \[B\] = \(2,\); got \(3,\)"),
        ({"cache_rows": jnp.array([0, 2])}, r"cache_rows must lie in \[0, 1\], the rows of k and v; got 2"),
        ({"cache_rows": jnp.array([-1, 0])}, r"cache_rows must lie in \[0, 1\], the rows of k and v; got -1"),
        ({"lengths": jnp.ones((1, 2), int)}, r"lengths must have shape \[B\] = \(2,\); got \(1, 2\)"),
        ({"skip_threshold": 1.5}, r"skip_threshold must lie in \[0, 1\]; got 1.5"),
        ({"skip_threshold": float("nan")}, r"skip_threshold must lie in \[0, 1\]; got nan"),
        ({"skip_threshold": jnp.zeros(3)}, r"skip_threshold must have shape \[\] or \[H\] = \(4,\); got \(3,\)"),
        ({"skip_threshold": True}, r"skip_threshold must hold numbers; got bool"),
        (
            {"return_kept": True},
            r"return_kept counts the blocks that skip_threshold leaves; got None. Use skip_threshold=0.0",
        ),
        ({"scale": float("nan")}, r"scale must be a finite number; got nan"),
        (
            {"implementation": "triton"},
            r"implementation must be None or one of \('mosaic_gpu', 'xla', 'reference'\); got 'triton'",
        ),
    ],
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("setting", "value"), [("skip_threshold", 0.1), ("cache_rows", jnp.zeros(1, jnp.int32))])
def test_settings_without_gradients(setting: str, value: Any, implementation: Implementation):
    arguments = suite.named("own-lists").arguments(KEY)

    def loss(q: jax.Array) -> Any:
        changed: dict[str, Any] = arguments | {"q": q, setting: value}
        out = block_sparse_attention(**changed, implementation=implementation)
        assert isinstance(out, jax.Array)
        return out.sum()

    with pytest.raises(NotImplementedError, match=rf"{setting} has no gradients\. Use {setting}=None"):
        jax.grad(loss)(arguments["q"])


def test_thresholds_are_values_of_one_program():
    arguments = suite.named("own-lists").arguments(KEY)
    traced = []

    @jax.jit
    def run(threshold: jax.Array) -> Any:
        traced.append(threshold)
        return block_sparse_attention(**arguments, skip_threshold=threshold)

    for threshold in (0.0, 0.1, 1.0):
        run(jnp.float32(threshold))
    assert len(traced) == 1

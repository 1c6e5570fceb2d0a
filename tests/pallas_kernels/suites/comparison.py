"""How results are compared, and the definitions once more, in plain loops over numpy arrays."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import BlockIndices
from pallas_kernels.devices import assume_hopper

# Compiles several times faster than the default generator.
KEY = jax.random.key(0, impl="rbg")
FLOAT32 = float(np.finfo(np.float32).eps)


def array(x: Any) -> np.ndarray:
    """As a numpy array of float64 (or of its own kind, if no float), so that comparing adds no error of its own."""
    x = np.asarray(x)
    return x if x.dtype.kind in "biu" else x.astype(np.float64)


def assert_within_rounding(got: Any, truth: Any, *, ulps: float = 16) -> None:
    """Float32 arrays may differ by a few roundings of their largest entry; infinities must agree, NaN is wrong."""
    got, truth = array(got), array(truth)
    assert got.shape == truth.shape
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isinf(got), np.isinf(truth))
    finite = np.isfinite(truth)
    got, truth = got[finite], truth[finite]
    assert np.abs(got - truth).max(initial=0) <= ulps * FLOAT32 * max(1, np.abs(truth).max(initial=0))


def assert_as_good_as(plain: Any, got: Any, truth: Any) -> None:
    """`got` may err from the float32 truth at most twice as much as `plain`, which has got's precision, plus a rounding floor.

    Held for the largest error and for the root of the mean square.
    """
    assert got.dtype == plain.dtype
    got, plain, truth = array(got), array(plain), array(truth)
    assert got.shape == truth.shape
    floor = 4 * FLOAT32 * max(1, np.abs(truth).max())
    for norm in (lambda x: np.abs(x).max(), lambda x: np.sqrt(np.mean(x**2))):
        assert norm(got - truth) <= 2 * norm(plain - truth) + floor


def assert_bitwise_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_lists(a: BlockIndices, b: BlockIndices) -> None:
    """Whatever the fillers are."""
    assert (a.block_size, a.indices.shape) == (b.block_size, b.indices.shape)
    np.testing.assert_array_equal(a.counts, b.counts)
    listed = np.arange(a.width) < np.asarray(a.counts)[..., None]
    np.testing.assert_array_equal(np.where(listed, a.indices, 0), np.where(listed, b.indices, 0))


def with_fillers(blocks: BlockIndices, filler: int) -> BlockIndices:
    """The same lists with another filler."""
    return BlockIndices(blocks.counts, jax.numpy.where(blocks.valid, blocks.indices, filler), blocks.block_size)


def listed_blocks(blocks: BlockIndices, num_key_blocks: int) -> np.ndarray:
    """[..., R, Sb]: which blocks each row lists."""
    counts, indices = np.asarray(blocks.counts), np.asarray(blocks.indices)
    listed = np.zeros((*counts.shape, num_key_blocks), bool)
    for row in np.ndindex(counts.shape):
        listed[row][indices[row][: counts[row]]] = True
    return listed


def listed_tokens(blocks: BlockIndices, num_keys: int) -> np.ndarray:
    """[..., R, S]: which keys each row lists."""
    listed = listed_blocks(blocks, -(-num_keys // blocks.block_size))
    return listed.repeat(blocks.block_size, axis=-1)[..., :num_keys]


def prefill_mask(arguments: dict[str, Any]) -> np.ndarray:
    """[B, H, T, S]: which keys each query of a `block_sparse_attention` call sees."""
    (batch, num_queries, heads, _), num_keys = arguments["q"].shape, arguments["k"].shape[1]
    blocks = arguments["blocks"]
    offsets = np.broadcast_to(np.asarray(arguments.get("query_offset", 0)), (batch,))
    lengths = np.asarray(arguments.get("lengths", [num_keys] * batch))
    listed = listed_tokens(blocks, num_keys)
    mask = np.zeros((batch, heads, num_queries, num_keys), bool)
    for i, h, t in np.ndindex(mask.shape[:3]):
        position = t + offsets[i]
        if position < lengths[i]:
            row = listed[i, h * listed.shape[1] // heads, t // blocks.block_size]
            mask[i, h, t, : position + 1] = row[: position + 1]
    return mask


@jax.jit
def _attention(q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
    if q.dtype != "float16" or (jax.default_backend() == "gpu" and q.shape[1] > 1):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    # Not on a CPU, and of a single query not on a GPU; the same in float32, with weights and output rounded as there.
    q, k, v = (x.astype("float32") for x in (q, k, v))
    k, v = (jax.numpy.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jax.numpy.where(mask, jax.numpy.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype("float16").astype("float32")
    return jax.numpy.einsum("bhts,bshd->bthd", weights, v).astype("float16")


def masked_attention(q: Any, k: Any, v: Any, mask: np.ndarray) -> jax.Array:
    """JAX's own attention of q [B, T, H, D] under a mask [B, H, T, S], 0 for queries that see nothing."""
    out = _attention(q, k, v, mask=mask)
    return jax.numpy.where(mask.any(-1).transpose(0, 2, 1)[..., None], out, 0)


def softmax_weights(q: Any, k: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [B, H, T, S] and lse [B, H, T] in float64 for q [B, T, H, D], k [B, S, K, D] and a mask [B, H, T, S]."""
    q, k = array(q), array(k)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(mask, scores, -np.inf))  # random scores are small: no maximum is needed
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        return weights / np.maximum(total, 1e-300)[..., None], np.log(total)


def shapes(case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a case without their numbers: shapes of the arrays, and what is static."""
    static = {}

    def arrays(key: jax.Array) -> dict[str, Any]:
        arguments = case.arguments(key)
        static.update(
            {name: x for name, x in arguments.items() if x is None or isinstance(x, bool | int | float | tuple)}
        )
        return {name: x for name, x in arguments.items() if name not in static}

    return jax.eval_shape(arrays, KEY), static


def assert_lowers_for_cuda(operation: Callable[..., Any], case: Any, **settings: Any) -> None:
    """A case passes the whole of Mosaic's own lowering: layouts, shared memory, limits of the copy engine."""
    arguments, static = shapes(case)
    call = functools.partial(operation, **static, **settings, implementation="mosaic_gpu")
    with assume_hopper():
        lowered = jax.jit(lambda x: call(**x)).trace(arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def slow_but(cases: Iterable[Any], *quick: str) -> list[Any]:
    """Cases for `parametrize`, all but those of these names marked slow: the interpreter takes seconds for each."""
    return [case if case.name in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def memory(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the compiled function needs in memory, in bytes; `arguments` are shapes."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis()

"""Comparisons of results, and masks and attention weights computed independently in NumPy."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockIndices, devices
from pallas_kernels.devices import assume_hopper

# Compiles several times faster than the default generator.
KEY = jax.random.key(0, impl="rbg")
FLOAT32 = float(np.finfo(np.float32).eps)


def array(x: Any) -> np.ndarray:
    """As a NumPy array, floats as float64, so that comparisons add no errors."""
    x = np.asarray(x)
    return x if x.dtype.kind in "biu" else x.astype(np.float64)


def assert_within_rounding(got: Any, truth: Any, *, ulps: float = 16) -> None:
    """Float32 arrays may differ by a few roundings of their largest element; infinities must agree, NaN fails."""
    got, truth = array(got), array(truth)
    assert got.shape == truth.shape
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isinf(got), np.isinf(truth))
    finite = np.isfinite(truth)
    got, truth = got[finite], truth[finite]
    assert np.abs(got - truth).max(initial=0) <= ulps * FLOAT32 * max(1, np.abs(truth).max(initial=0))


def assert_as_good_as(plain: Any, got: Any, truth: Any) -> None:
    """Errors of `got` are at most twice those of `plain`, which has the same precision, plus a rounding floor.

    Errors are relative to the float32 truth, both the maximum and the root mean square.
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
    """Fillers may differ."""
    assert (a.block_size, a.indices.shape) == (b.block_size, b.indices.shape)
    np.testing.assert_array_equal(a.counts, b.counts)
    listed = np.arange(a.width) < np.asarray(a.counts)[..., None]
    np.testing.assert_array_equal(np.where(listed, a.indices, 0), np.where(listed, b.indices, 0))


def with_fillers(blocks: BlockIndices, filler: int) -> BlockIndices:
    """The same lists with another filler."""
    return BlockIndices(blocks.counts, jnp.where(blocks.valid, blocks.indices, filler), blocks.block_size)


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
    # JAX has no float16 attention on CPUs, nor for a single query on GPUs: float32, with weights and output rounded alike.
    q, k, v = (x.astype("float32") for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype("float16").astype("float32")
    return jnp.einsum("bhts,bshd->bthd", weights, v).astype("float16")


def masked_attention(q: Any, k: Any, v: Any, mask: np.ndarray) -> jax.Array:
    """JAX's attention of q [B, T, H, D] under a mask [B, H, T, S], 0 for queries that see no key."""
    out = _attention(q, k, v, mask=mask)
    return jnp.where(mask.any(-1).transpose(0, 2, 1)[..., None], out, 0)


def masked_lse(q: Any, k: Any, mask: np.ndarray) -> jax.Array:
    """[B, T, H]: lse of plain attention under a mask [B, H, T, S], in float32; 0 for queries that see no key."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    lse = jax.nn.logsumexp(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.where(mask.any(-1), lse, 0).transpose(0, 2, 1)


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
    """The arguments of a case: shapes of its arrays, and its static arguments."""
    static = {}

    def arrays(key: jax.Array) -> dict[str, Any]:
        arguments = case.arguments(key)
        static.update(
            {name: x for name, x in arguments.items() if x is None or isinstance(x, bool | int | float | str | tuple)}
        )
        return {name: x for name, x in arguments.items() if name not in static}

    return jax.eval_shape(arrays, KEY), static


def assert_lowers_for_cuda(operation: Callable[..., Any], case: Any, **settings: Any) -> None:
    """A case passes Mosaic's lowering: layouts, shared memory, limits of TMA."""
    arguments, static = shapes(case)
    call = functools.partial(operation, **static, **settings, implementation="mosaic_gpu")
    with assume_hopper():
        lowered = jax.jit(lambda x: call(**x)).trace(arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def assert_left_to_xla(operation: Callable[..., Any], case: Any, message: str) -> None:
    """The kernel refuses a case with this message; the operation's program for a GPU is XLA's then."""
    arguments, static = shapes(case)

    def program(**chosen: Any) -> str:
        call = functools.partial(operation, **static, **chosen)
        return jax.jit(lambda x: call(**x)).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()

    with assume_hopper():
        with pytest.raises(NotImplementedError, match=message):
            program(implementation="mosaic_gpu")
        assert program() == program(implementation="xla")


def compare_with_sharded(
    run: Callable[..., Any],
    arguments: dict[str, Any],
    specs: dict[str, P],
    out_specs: Any,
    compare: Callable[[Any, Any], None] = assert_bitwise_equal,
) -> None:
    """Under `jax.shard_map`, with heads spread over two devices, results are those of one device.

    Args:
      run: the operation; takes `arguments`.
      arguments: all of them arrays.
      specs: how arguments are sharded over the mesh axis "model"; replicated if left out.
      out_specs: how results are sharded.
      compare: how they are compared.
    """
    # The interpreter runs kernels on the first device alone.
    count = 1 if devices.interpreter() is not None else min(2, len(jax.devices()))
    mesh = jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,))
    # check_vma: kernels do not declare the mesh axes over which their results vary.
    sharded = jax.shard_map(
        lambda x: run(**x),
        mesh=mesh,
        in_specs=({name: specs.get(name, P()) for name in arguments},),
        out_specs=out_specs,
        check_vma=False,
    )
    got, alone = jax.jit(sharded)(arguments), run(**arguments)
    assert all(len(x.devices()) == count for x in jax.tree.leaves(got))
    compare(got, alone)


def slow_but(cases: Iterable[Any], *quick: str) -> list[Any]:
    """Cases for `parametrize`, all but the named ones marked slow: the interpreter takes seconds for each."""
    return [case if case.name in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def memory(function: Callable[..., Any], *arguments: Any) -> Any:
    """Memory that the compiled function needs; `arguments` are shapes."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis()

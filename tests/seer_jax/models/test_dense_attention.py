"""Dense attention: cuDNN where it works, chunks of queries elsewhere, for the same results."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import devices
from seer_jax.models import dense_attention as module
from seer_jax.models.dense_attention import dense_attention

pytestmark = pytest.mark.usefixtures("compile_quickly")

MARK = 1000.0  # which the stand-in for cuDNN adds, so that programs tell what runs


def arrays(dtype: str = "bfloat16", tokens: int = 40, heads: int = 4, dim: int = 16) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, tokens, h, dim)), dtype) for h in (heads, 2, 2))


@jax.checkpoint
def marked_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """A stand-in for cuDNN, which keeps q, k and v for its gradients."""
    del lengths
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla") + MARK


def has_mark(function: Callable, *arguments: Any, platform: str) -> bool:
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return "1.000000e+03" in text or "9.984000e+02" in text  # the latter in bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that this process seems to have: in fact a CPU, for which cuDNN compiles nothing."""
    monkeypatch.setattr(devices, "local_gpus", lambda: (jax.devices("cpu")[0],))
    for cache in (module._cudnn_error, module._warn_once, jax):
        getattr(cache, "cache_clear", jax.clear_caches)()
    yield
    for cache in (module._cudnn_error, module._warn_once, jax):
        getattr(cache, "cache_clear", jax.clear_caches)()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, gpu: None) -> list[Any]:
    """cuDNN seems to work: the shapes that it is asked to compile, and a stand-in for it."""
    asked: list[Any] = []
    monkeypatch.setattr(module, "_compile", lambda function, *shapes: asked.append(shapes))
    monkeypatch.setattr(module, "_attend_in_cudnn", marked_attention)
    return asked


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_queries_equal_one_piece(packed: bool):
    """Longer than a chunk of queries and a span of chunks, at a length that divides neither."""
    q, k, v = (x[:1] for x in arrays("float32", 2611, heads=2, dim=8))
    mask, ids = jnp.tril(jnp.ones((1, 1, 2611, 2611), bool)), None
    if packed:
        ids = jnp.asarray(np.repeat([1, 2, 3], [700, 1500, 411])[None], jnp.int32)
        mask &= (ids[:, :, None] == ids[:, None, :])[:, None]
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
    error = jnp.linalg.norm(dense_attention(q, k, v, segment_ids=ids) - expected)
    assert error < 1e-6 * jnp.linalg.norm(expected)


TRANSFORMS: dict[str, Callable] = {
    "plain": lambda f: f,
    "grad": lambda f: lambda *x: jax.grad(lambda *x: f(*x).astype("float32").sum(), argnums=(0, 1, 2))(*x),
    "vmap": lambda f: lambda *x: jax.vmap(f)(*(a[None] for a in x)),
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, _: (f(c, *x[1:]), None), x[0], None, length=2)[0],
    "checkpoint": lambda f: jax.grad(lambda *x: jax.checkpoint(f)(*x).astype("float32").sum(), argnums=(0, 1, 2)),
    "shard_map": lambda f: jax.shard_map(
        f, mesh=jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)), in_specs=P("x"), out_specs=P("x")
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(transform, marks=pytest.mark.slow if name in ("scan", "checkpoint") else (), id=name)
        for name, transform in TRANSFORMS.items()
    ],
)
def test_programs_take_cudnn_on_gpus_and_chunks_elsewhere(probes: list[Any], transform: Callable):
    """Gradients alone have no use for the output, so that the mark is in none of their programs."""
    call, x = transform(dense_attention), arrays()
    chunks = transform(lambda q, k, v: module._attend_in_chunks(q, k, v, None))
    assert not has_mark(call, *x, platform="cpu")
    if transform not in (TRANSFORMS["grad"], TRANSFORMS["checkpoint"]):
        assert has_mark(call, *x, platform="cuda")
    else:
        texts = [jax.jit(call).trace(*x).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")]
        assert "while" in texts[0] and "while" not in texts[1]
    for eager in (True, False):
        got = (call if eager else jax.jit(call))(*x)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(chunks)(*x)), strict=True):
            np.testing.assert_allclose(np.asarray(a, "float32"), np.asarray(b, "float32"), rtol=2**-6, atol=2**-6)


@pytest.mark.cpu
def test_arguments_that_cudnn_does_not_take_are_not_tried(probes: list[Any]):
    assert not has_mark(dense_attention, *arrays("float32"), platform="cuda")
    packed = functools.partial(dense_attention, segment_ids=jnp.ones((2, 40), int))
    assert not has_mark(packed, *arrays(), platform="cuda")
    assert not probes


@pytest.mark.cpu
def test_each_kind_of_call_is_tried_once(probes: list[Any]):
    """On small arrays, for calls of any size."""
    for tokens in (40, 80):
        for lengths in (None, jnp.array([3, 4])):
            jax.jit(functools.partial(dense_attention, lengths=lengths))(*arrays(tokens=tokens))
    q, k = ((1, 64, heads, 16) for heads in (2, 1))
    assert [jax.tree.map(lambda x: x.shape, shapes) for shapes in probes] == [(q, k, k, None), (q, k, k, (1,))]
    jax.jit(dense_attention)(*arrays("float16"))
    jax.jit(dense_attention)(*arrays(heads=2))
    jax.jit(dense_attention)(*arrays(dim=32))
    assert len(probes) == 5
    jax.jit(jax.grad(lambda *x: dense_attention(*x).astype("float32").sum()))(*arrays())
    assert len(probes) == 6


@pytest.mark.cpu
@pytest.mark.parametrize("jit", [False, True])
def test_a_cudnn_that_fails_is_replaced_with_one_warning(gpu: None, jit: bool, recwarn: pytest.WarningsRecorder):
    """That of this machine."""
    call = jax.jit(dense_attention) if jit else dense_attention
    message = (
        r"dense_attention: cuDNN must compile attention of bfloat16 with head dim 16 and 2 query heads per key/value head; "
        r"got RuntimeError: .*\. XLA computes it, more slowly: check the GPU and the installation of cuDNN\."
    )
    with pytest.warns(RuntimeWarning, match=message):
        out = call(*arrays())
    np.testing.assert_array_equal(out, jax.jit(lambda q, k, v: module._attend_in_chunks(q, k, v, None))(*arrays()))
    assert not has_mark(dense_attention, *arrays(tokens=41), platform="cuda")
    assert len(recwarn) == 0


@pytest.mark.cpu
def test_a_cudnn_that_fails_at_gradients_still_gives_outputs(monkeypatch: pytest.MonkeyPatch, probes: list[Any]):
    def compile_outputs(function: Callable, *shapes: Any) -> None:
        if not isinstance(jax.eval_shape(function, *shapes), jax.ShapeDtypeStruct):
            raise NotImplementedError("No kernel for this head dim.")

    monkeypatch.setattr(module, "_compile", compile_outputs)
    gradient = jax.grad(lambda *x: dense_attention(*x).astype("float32").sum(), argnums=(0, 1, 2))
    assert has_mark(dense_attention, *arrays(), platform="cuda")
    with pytest.warns(RuntimeWarning, match="got NotImplementedError: No kernel for this head dim."):
        text = jax.jit(gradient).trace(*arrays()).lower(lowering_platforms=("cuda",)).as_text()
    assert "while" in text  # over chunks


@pytest.mark.cpu
def test_a_mesh_does_not_reach_the_probe(monkeypatch: pytest.MonkeyPatch, gpu: None):
    """It would run on all devices of the mesh."""
    monkeypatch.setattr(module, "_attend_in_cudnn", marked_attention)
    with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("x",))):
        assert has_mark(dense_attention, *arrays(), platform="cuda")


@pytest.mark.cpu
def test_gradients_keep_no_residuals_of_the_other_platform(probes: list[Any]):
    def residual_bytes(function: Callable) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(jax.vjp(function, *arrays(tokens=600))[1]))

    alone = residual_bytes(lambda q, k, v: marked_attention(q, k, v, None))
    assert alone <= residual_bytes(dense_attention) <= alone + 100  # the number of the platform

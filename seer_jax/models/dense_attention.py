"""Dense causal attention of prompts and training sequences: in cuDNN where it works, otherwise in chunks of queries."""

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from pallas_kernels import devices

QUERY_CHUNK = 256
CHUNKS_PER_SPAN = 4  # fewer waste less work on the future, more compile faster
MAX_SPANS = 8
PROBE_TOKENS = 64


def dense_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v with causality, differentiable; q and k after RoPE.

    On NVIDIA GPUs cuDNN computes it for bfloat16 and float16 without `segment_ids`. Elsewhere, and where cuDNN fails, queries are
    taken in chunks, so that no T x T array is made.

    Args:
      lengths: tokens of each row that count; later rows of the output are undefined but finite.
      segment_ids: tokens attend within their own segment (packed sequences).

    Warns:
      RuntimeWarning: cuDNN fails for arrays of this kind on this machine; once for each kind.
    """
    if segment_ids is None and q.dtype in (jnp.bfloat16, jnp.float16) and devices.local_gpus():
        return _choose_when_lowered(q, k, v, lengths)
    return _attend_in_chunks(q, k, v, segment_ids)


class _Kind(NamedTuple):
    """What decides whether cuDNN takes a call.

    Fields:
      dtype, head_dim: of q, k and v.
      group: H / K.
      has_lengths: whether there are `lengths`.
      differentiated: whether a gradient is taken.
    """

    dtype: str
    head_dim: int
    group: int
    has_lengths: bool
    differentiated: bool


# Jitted, so that under an eager `jax.grad` or `jax.vmap`, too, it is the device of the arrays that decides.
@jax.jit
def _choose_when_lowered(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    return _choose(q, k, v, lengths)


# A rule of its own tells whether a gradient is taken: cuDNN may fail at the gradient of what it computes.
@jax.custom_vjp
def _choose(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    return _chosen(q, k, lengths, differentiated=False)(q, k, v, lengths)


def _forward_rule(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Callable]:
    attend = _chosen(q, k, lengths, differentiated=True)
    return jax.vjp(lambda q, k, v: attend(q, k, v, lengths), q, k, v)


def _backward_rule(pull_back: Callable, cotangent: Array) -> tuple:
    return *pull_back(cotangent), None


_choose.defvjp(_forward_rule, _backward_rule)


def _chosen(q: Array, k: Array, lengths: Array | None, *, differentiated: bool) -> Callable[..., Array]:
    """The function of (q, k, v, lengths) that runs: on GPUs cuDNN's, if it works."""
    group = q.shape[2] // k.shape[2]
    kind = _Kind(str(q.dtype), q.shape[3], group, lengths is not None, differentiated)
    error = _cudnn_error(kind)
    if error is None:
        return lambda *arrays: jax.lax.platform_dependent(*arrays, cuda=_attend_in_cudnn, default=_attend_beside_cudnn)
    _warn_once(
        f"dense_attention: cuDNN must compile attention of {kind.dtype} with head dim {kind.head_dim} and {kind.group} query heads "
        f"per key/value head; got {error} XLA computes it, more slowly: check the GPU and the installation of cuDNN."
    )
    return lambda q, k, v, lengths: _attend_in_chunks(q, k, v, None)


@functools.cache
def _cudnn_error(kind: _Kind) -> str | None:
    """Compiles a small call on the first GPU; None if that works."""
    sharding = SingleDeviceSharding(devices.local_gpus()[0])

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = (array((1, PROBE_TOKENS, heads, kind.head_dim), kind.dtype) for heads in (kind.group, 1))
    lengths = array((1,), "int32") if kind.has_lengths else None

    def attend(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
        return _attend_in_cudnn(q, k, v, lengths).astype("float32").sum()

    function = jax.grad(attend, argnums=(0, 1, 2)) if kind.differentiated else attend
    # In a thread of its own: a mesh that the caller has set would be that of the probe as well.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(_compile, function, q, k, k, lengths).result()
        except Exception as error:  # a broken installation may raise anything; the warning quotes it
            text = str(error).strip().split("\n")[0][:200].rstrip(".")
            return f"{type(error).__name__}: {text}."
    return None


def _compile(function: Callable, *shapes: Any) -> None:
    jax.jit(function).lower(*shapes).compile()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _attend_in_cudnn(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )


# A program for GPUs carries zeros in place of this branch's residuals, unless cuDNN's have their shapes: those of q, k and v do.
@jax.custom_vjp
def _attend_beside_cudnn(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    del lengths
    return _attend_in_chunks(q, k, v, None)


def _beside_cudnn_forward(
    q: Array, k: Array, v: Array, lengths: Array | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _attend_beside_cudnn(q, k, v, lengths), (q, k, v)


def _beside_cudnn_backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple:
    return *jax.vjp(lambda q, k, v: _attend_in_chunks(q, k, v, None), *residuals)[1](cotangent), None


_attend_beside_cudnn.defvjp(_beside_cudnn_forward, _beside_cudnn_backward)


def _attend_in_chunks(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    # A causal row never sees beyond its own length, so `lengths` would change no row that counts.
    batch, tokens, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    size = min(QUERY_CHUNK, tokens)
    chunks = -(-tokens // size)
    queries = jnp.pad(q * dim**-0.5, ((0, 0), (0, chunks * size - tokens), (0, 0), (0, 0)))
    queries = queries.reshape(batch, chunks, size, kv_heads, group, dim).transpose(1, 0, 3, 4, 2, 5)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, D]: one matrix product per head

    @jax.checkpoint
    def attend(chunk: jax.Array, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        rows = jnp.minimum(chunk * size + jnp.arange(size), tokens - 1)
        mask = jnp.broadcast_to(rows[:, None] >= jnp.arange(keys.shape[2])[None], (batch, size, keys.shape[2]))
        if segment_ids is not None:
            mask &= segment_ids[:, rows, None] == segment_ids[:, None, : keys.shape[2]]
        folded = queries.reshape(batch, kv_heads, group * size, dim)
        logits = jnp.einsum("bkmd,bksd->bkms", folded, keys, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None], logits.reshape(*queries.shape[:-1], -1), -jnp.inf)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        weights = weights.reshape(*folded.shape[:-1], -1).astype(v.dtype)
        out = jnp.einsum("bkms,bksd->bkmd", weights, values, preferred_element_type=jnp.float32)
        return (out.reshape(queries.shape) / total).astype(q.dtype)

    parts = []
    step = max(CHUNKS_PER_SPAN, -(-chunks // MAX_SPANS))
    for first in range(0, chunks, step):
        last = min(first + step, chunks)
        span = slice(0, last * size)  # what lies after the span is in the future of all its queries
        scanned = (jnp.arange(first, last), queries[first:last])
        parts.append(jax.lax.map(lambda x, span=span: attend(*x, keys[:, :, span], values[:, :, span]), scanned))
    out = jnp.concatenate(parts).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, dim)[:, :tokens]

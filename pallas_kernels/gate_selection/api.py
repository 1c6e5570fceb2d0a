"""`select_blocks`: lists of key blocks from gate logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.checks import check_arrays, check_block_size, check_count

_run = Operation("select_blocks", "pallas_kernels.gate_selection")

# What a value of each rule must do, in words and for arrays. Comparisons are written so that NaN does not.
_DOMAINS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "threshold": ("lie from 0 to 1, as softmax does", lambda x: (x >= 0) & (x <= 1)),
    "mass": ("be above 0 and at most 1", lambda x: (x > 0) & (x <= 1)),
    "top_k": ("be at least 1 block", lambda x: x >= 1),
    "max_blocks": ("be at least 1 block", lambda x: x >= 1),
}


def select_blocks(
    logits: Float32[Array, "*lists R Sb"],
    *,
    block_size: int,
    threshold: float | Float[Array, "..."] | None = None,
    mass: float | Float[Array, "..."] | None = None,
    top_k: int | Int[Array, "..."] | None = None,
    max_blocks: int | Int[Array, "..."] | None = None,
    keep: Bool[Array, "..."] | None = None,
    visible: Int[Array, "..."] | None = None,
    width: int | None = None,
    implementation: Implementation | None = None,
) -> BlockIndices:
    """Selects key blocks by their gate logits.

    Candidates of a row are the visible blocks with a logit above -inf. At most one rule selects among them:

      threshold: blocks whose softmax over the row exceeds `threshold`;
      mass: the smallest set of top blocks whose softmax sums to `mass` or more, at least one block; all candidates if `mass` is 1;
      top_k: the k largest logits;
      max_blocks: the largest logits, after the kept blocks, up to max_blocks in all;
      none: every candidate.

    Visible blocks in `keep` are always selected, whatever their logits. They count towards max_blocks alone; if they exceed it, those
    with the lowest block numbers stay. Ties go to the lower block number.

    Args:
      logits: gate scores before softmax, float32; -inf for blocks that are no candidates. NaN counts as -inf; +inf is outside the
        domain.
      block_size: b, tokens per block, part of the result.
      threshold: from 0 to 1.
      mass: above 0, at most 1.
      top_k: k, at least 1.
      max_blocks: at least 1.
      keep: blocks that are always selected; broadcasts to the shape of `logits`.
      visible: number of visible blocks: the blocks from this number on are not selected, and their logits are not read, which
        makes kernels faster. Broadcasts to [..., R, 1]; None: every block is visible. Causal prefill passes r + 1 for row r.
      width: N of the result. If None, the smallest that holds any selection: min(top_k, Sb) for an int top_k without keep,
        min(max_blocks, Sb) for an int max_blocks, otherwise Sb. Pass less if rows are known to select less.
      implementation: "reference", "xla", "mosaic_gpu" (Hopper GPUs; Sb up to 16384), or None for the fastest that takes these
        arguments on their device.

    Returns:
      BlockIndices with counts [..., R] and indices [..., R, N].

    Raises:
      ValueError: several rules, a rule out of its domain, shapes or dtypes that do not match, or a row that selects more than
        `width` blocks. Under `jax.jit` values of arrays are not known: they are not checked, nor is `width`, and a row that selects
        more loses its highest blocks.
      NotImplementedError: the named implementation cannot do this.

    Source: threshold and top-k of SeerAttention, arXiv 2410.13276; token budget of SeerAttention-R, arXiv 2506.08889; cumulative
    mass as in nucleus sampling, arXiv 1904.09751.

    >>> logits = jnp.array([[0.0, 2.0, 1.0, -jnp.inf]])
    >>> select_blocks(logits, block_size=64, top_k=2).indices.tolist()
    [[1, 2]]
    >>> select_blocks(logits, block_size=64, max_blocks=2, keep=jnp.array([[False, False, False, True]])).indices.tolist()
    [[1, 3]]
    """
    name = "select_blocks"
    check_block_size(name, block_size)
    check_arrays(name, logits=logits, keep=keep, visible=visible)
    if logits.dtype != jnp.float32 or logits.ndim < 2:
        raise ValueError(f"{name}: logits must be a float32 array [..., R, Sb]; got {logits.dtype} {logits.shape}.")
    if 0 in logits.shape:
        raise ValueError(f"{name}: no axis may be empty; got {logits.shape}.")
    rules = {"threshold": threshold, "mass": mass, "top_k": top_k, "max_blocks": max_blocks}
    given = {rule: value for rule, value in rules.items() if value is not None}
    if len(given) > 1:
        raise ValueError(
            f"{name}: at most one of threshold, mass, top_k and max_blocks may be given; got {' and '.join(given)}."
        )
    if width is not None:
        check_count(name, "width", width)
    rules = {rule: _rule_value(name, rule, value, logits.shape) for rule, value in rules.items()}
    if keep is not None:
        if keep.dtype != jnp.bool_:
            raise ValueError(f"{name}: keep must be bool; got {keep.dtype}.")
        _check_broadcast(name, "keep", "[..., R, Sb]", keep.shape, logits.shape)
        keep = keep.reshape((1,) * (logits.ndim - keep.ndim) + keep.shape)
    if visible is not None:
        if not jnp.issubdtype(visible.dtype, jnp.integer):
            raise ValueError(f"{name}: visible must hold integers; got {visible.dtype}.")
        _check_broadcast(name, "visible", "[..., R, 1]", visible.shape, (*logits.shape[:-1], 1))
        visible = jnp.broadcast_to(visible.astype(jnp.int32), (*logits.shape[:-1], 1))
    if width is None:
        bound = rules["max_blocks" if keep is not None or top_k is None else "top_k"]
        width = min(bound, logits.shape[-1]) if isinstance(bound, int) else logits.shape[-1]
    logits = jax.lax.stop_gradient(logits)
    return _run(implementation, logits, block_size=block_size, **rules, keep=keep, visible=visible, width=width)


def _rule_value(name: str, rule: str, value: float | Array | None, shape: tuple[int, ...]) -> int | Array | None:
    """The value of a rule: an int for an int number of blocks, otherwise an array [..., R, 1]."""
    if value is None:
        return None
    counted = rule in ("top_k", "max_blocks")
    known = None if isinstance(value, Tracer) else np.asarray(value)
    dtype = jnp.asarray(value).dtype if known is None else known.dtype
    if not jnp.issubdtype(dtype, jnp.integer if counted else jnp.number):
        raise ValueError(f"{name}: {rule} must hold {'integers' if counted else 'numbers'}; got {dtype}.")
    must, holds = _DOMAINS[rule]
    if known is not None and (wrong := known[~holds(known)]).size:
        raise ValueError(f"{name}: {rule} must {must}; got {wrong.flat[0]}.")
    if counted and isinstance(value, int | np.integer):
        return int(value)
    array = jax.lax.stop_gradient(jnp.asarray(value))
    _check_broadcast(name, rule, "[..., R, 1]", array.shape, (*shape[:-1], 1))
    return jnp.broadcast_to(array.astype(jnp.int32 if counted else jnp.float32), (*shape[:-1], 1))


def _check_broadcast(name: str, argument: str, letters: str, own: tuple[int, ...], target: tuple[int, ...]) -> None:
    fits = len(own) <= len(target) and all(a in (1, b) for a, b in zip(own[::-1], target[::-1], strict=False))
    if not fits:
        raise ValueError(f"{name}: {argument} must broadcast to {letters} = {target}; got {own}.")

"""`select_blocks`: from gate logits to lists of key blocks."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.backends import Implementation, Operation
from pallas_kernels.blocks import BlockIndices
from pallas_kernels.checks import check_block_size

_run = Operation("select_blocks", "pallas_kernels.gate_selection")


def select_blocks(
    logits: Float32[Array, "*lists R Sb"],
    *,
    block_size: int,
    threshold: float | Float[Array, "..."] | None = None,
    top_k: int | None = None,
    max_blocks: int | None = None,
    keep: Bool[Array, "..."] | None = None,
    width: int | None = None,
    implementation: Implementation | None = None,
) -> BlockIndices:
    """Chooses key blocks by their gate logits.

    A row may choose the blocks whose logit is above -inf. At most one rule is given:

      threshold: softmax over the row > threshold;
      top_k: the k best logits;
      max_blocks: the best logits, after the kept blocks, until there are max_blocks in all;
      none: every block that may be chosen.

    Blocks in `keep` are chosen besides, whatever their logit is; they count against max_blocks only (where they alone are more,
    the lowest numbers stay). Among equal logits the lower block number wins.

    Args:
      logits: gate scores before softmax, float32; -inf where a block must not be chosen by score. NaN counts as -inf, +inf is
        outside the domain.
      block_size: b, tokens per block, carried along in the result.
      threshold: from 0 to 1, a number or an array that broadcasts to [..., R, 1], for example [H, 1, 1].
      top_k: k, at least 1.
      max_blocks: at least 1.
      keep: blocks that are always chosen; broadcasts to the shape of `logits`.
      width: N of the result. If None, the least that always holds the choice: min(top_k, Sb) for top_k without keep,
        min(max_blocks, Sb) for max_blocks, else Sb. Give less where you know that rows choose less.
      implementation: "reference", "xla", or None for the best that works here.

    Returns:
      BlockIndices with counts [..., R] and indices [..., R, N].

    Raises:
      ValueError: several rules, a rule out of its domain, shapes or dtypes that do not fit each other, or a row that chooses
        more than `width` blocks. Under `jax.jit` the last cannot be seen: the row then loses its highest blocks.
      NotImplementedError: the named implementation cannot do this.

    Source: threshold and top-k of SeerAttention, arXiv 2410.13276; token budget of SeerAttention-R, arXiv 2506.08889.

    >>> logits = jnp.array([[0.0, 2.0, 1.0, -jnp.inf]])
    >>> select_blocks(logits, block_size=64, top_k=2).indices.tolist()
    [[1, 2]]
    >>> select_blocks(logits, block_size=64, max_blocks=2, keep=jnp.array([[False, False, False, True]])).indices.tolist()
    [[1, 3]]
    """
    name = "select_blocks"
    check_block_size(name, block_size)
    if logits.dtype != jnp.float32 or logits.ndim < 2:
        raise ValueError(f"{name}: logits must be a float32 array [..., R, Sb]; got {logits.dtype} {logits.shape}.")
    rules = {"threshold": threshold, "top_k": top_k, "max_blocks": max_blocks}
    given = [rule for rule, value in rules.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{name}: at most one of threshold, top_k and max_blocks may be given; got {' and '.join(given)}."
        )
    for rule, value in (("top_k", top_k), ("max_blocks", max_blocks), ("width", width)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {rule} must be at least 1 block; got {value}.")
    if isinstance(threshold, int | float) and not 0 <= threshold <= 1:
        raise ValueError(f"{name}: threshold is compared with a softmax and must lie from 0 to 1; got {threshold}.")
    if threshold is not None:
        threshold = _broadcast(name, "threshold", "[..., R, 1]", jnp.asarray(threshold), (*logits.shape[:-1], 1))
    if keep is not None:
        if keep.dtype != jnp.bool_:
            raise ValueError(f"{name}: keep must be bool; got {keep.dtype}.")
        keep = _broadcast(name, "keep", "[..., R, Sb]", keep, logits.shape)
    if width is None:
        bound = max_blocks if keep is not None else max_blocks or top_k
        width = min(bound or logits.shape[-1], logits.shape[-1])
    return _run(
        implementation,
        logits,
        block_size=block_size,
        threshold=threshold,
        top_k=top_k,
        max_blocks=max_blocks,
        keep=keep,
        width=width,
    )


def _broadcast(name: str, argument: str, letters: str, array: Array, target: tuple[int, ...]) -> Array:
    own = array.shape
    fits = len(own) <= len(target) and all(a in (1, b) for a, b in zip(own[::-1], target[::-1], strict=False))
    if not fits:
        raise ValueError(f"{name}: {argument} must broadcast to {letters} = {target}; got {own}.")
    return jnp.broadcast_to(array, target)

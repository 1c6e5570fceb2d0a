"""`BlockIndices`: the key blocks that each row attends to."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float32, Int, Int32, Shaped

from pallas_kernels.checks import check_arrays, check_block_size


def _scatter(targets: Int[Array, "... n"], values: Shaped[Array, "n"], width: int) -> Shaped[Array, "... width"]:
    """Scatters value i to target i of each row, of `width` entries that are zero otherwise; drops targets beyond the width."""

    def write(row: Array) -> Array:
        return jnp.zeros(width, values.dtype).at[row].set(values, mode="drop")

    return jax.vmap(write)(targets.reshape(-1, targets.shape[-1])).reshape(*targets.shape[:-1], width)


def _is_concrete(*arrays: Array) -> bool:
    return not any(isinstance(x, Tracer) for x in arrays)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class BlockIndices:
    """Lists of key blocks, one per row: the sparse form of a mask that kernels read.

    A row is a block of `block_size` query tokens in prefill and a key/value head in decode:

      prefill: counts [B, Hs, Tb], indices [B, Hs, Tb, N], with Hs lists per query block: 1 (shared by all heads), K (one per
        key/value head, shared by its query heads) or H (one per query head);
      decode: counts [B, K], indices [B, K, N].

    The first `counts[r]` entries of `indices[r]` are block numbers, strictly ascending. The entries after them are fillers, which
    may be any integers: kernels that write lists leave that memory uninitialized.

    Args:
      counts: number of blocks that each row keeps, 0 to N.
      indices: their block numbers, 0 to Sb - 1; N is the static width of the lists.
      block_size: b, tokens per block: 16, 32, 64 or 128.

    Raises:
      ValueError: `block_size` is not one of those, or the arrays are not int32 of shapes [..., R] and [..., R, N].

    >>> blocks = BlockIndices.from_mask(jnp.array([[True, False], [True, True]]), block_size=64)
    >>> blocks.counts.tolist(), blocks.indices.tolist()
    ([1, 2], [[0, 0], [0, 1]])
    """

    counts: Int32[Array, "... R"]
    indices: Int32[Array, "... R N"]
    block_size: int

    def __post_init__(self):
        check_block_size("BlockIndices", self.block_size)
        check_arrays("BlockIndices", counts=self.counts, indices=self.indices)
        for name, array in (("counts", self.counts), ("indices", self.indices)):
            if array.dtype != jnp.int32:
                raise ValueError(
                    f"BlockIndices: {name} must be int32; got {array.dtype}. Convert it with .astype('int32')."
                )
        if self.indices.shape[:-1] != self.counts.shape or not self.counts.shape:
            raise ValueError(
                "BlockIndices: counts must be [..., R] and indices [..., R, N] with the same leading axes; "
                f"got counts {self.counts.shape} and indices {self.indices.shape}."
            )

    def tree_flatten_with_keys(self) -> tuple[tuple, int]:
        key = jax.tree_util.GetAttrKey
        return ((key("counts"), self.counts), (key("indices"), self.indices)), self.block_size

    @classmethod
    def tree_unflatten(cls, block_size: int, leaves: Iterable[Any]) -> "BlockIndices":
        # No checks: JAX also builds pytrees whose leaves are not arrays (shapes, axes, sentinels).
        self = object.__new__(cls)
        for name, value in zip(("counts", "indices", "block_size"), (*leaves, block_size), strict=True):
            object.__setattr__(self, name, value)
        return self

    @property
    def width(self) -> int:
        """N, the static width of the lists."""
        return self.indices.shape[-1]

    @property
    def valid(self) -> Bool[Array, "... R N"]:
        """Which entries of `indices` are block numbers; the others are fillers."""
        return jax.lax.broadcasted_iota(jnp.int32, self.indices.shape, self.indices.ndim - 1) < self.counts[..., None]

    def to_mask(self, num_key_blocks: int) -> Bool[Array, "... R Sb"]:
        """The lists as a mask over `num_key_blocks` blocks."""
        target = jnp.where(self.valid, self.indices, num_key_blocks)
        return _scatter(target, jnp.ones(self.width, bool), num_key_blocks)

    @classmethod
    def from_mask(
        cls, mask: Bool[Array, "... R Sb"], *, block_size: int, max_blocks: int | None = None
    ) -> "BlockIndices":
        """The lists of a mask, with 0 as filler.

        Args:
          mask: which blocks each row keeps.
          block_size: b, tokens per block.
          max_blocks: N, the static width of the lists; Sb if None. Pass less if rows keep few blocks.

        Raises:
          ValueError: a row keeps more than `max_blocks` blocks. This is not checked under `jax.jit`, where such a row loses its
            highest blocks.
        """
        check_arrays("from_mask", mask=mask)
        if mask.dtype != jnp.bool_ or mask.ndim < 2:
            raise ValueError(f"from_mask: mask must be a bool array [..., R, Sb]; got {mask.dtype} {mask.shape}.")
        width = mask.shape[-1] if max_blocks is None else max_blocks
        if width < 1:
            raise ValueError(f"from_mask: max_blocks must be at least 1; got {width}.")
        if _is_concrete(mask) and width < mask.shape[-1]:
            most = int(np.asarray(mask).sum(-1).max(initial=0))
            if most > width:
                raise ValueError(
                    f"from_mask: no row may keep more than max_blocks={width} blocks; got a row with {most}. Raise max_blocks."
                )
        place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        indices = _scatter(jnp.where(mask, place, width), jnp.arange(mask.shape[-1], dtype=jnp.int32), width)
        return cls(jnp.minimum(mask.sum(-1, dtype=jnp.int32), width), indices, block_size)

    @classmethod
    def all_causal(
        cls,
        num_queries: int,
        num_keys: int,
        *,
        block_size: int,
        query_offset: int | Int[Array, "B"] = 0,
        batch: int = 1,
        lists: int = 1,
    ) -> "BlockIndices":
        """Prefill lists of all visible blocks, over which attention is dense causal attention.

        Args:
          num_queries, num_keys: T and S, tokens.
          block_size: b, tokens per block.
          query_offset: position of the first query.
          batch: B.
          lists: Hs, lists per query block.

        Returns:
          counts [B, Hs, Tb], indices [B, Hs, Tb, Sb].
        """
        check_block_size("all_causal", block_size)
        num_rows, num_blocks = -(-num_queries // block_size), -(-num_keys // block_size)
        ends = jnp.minimum((jnp.arange(num_rows) + 1) * block_size, num_queries)  # one past the last query of each row
        ends = jnp.broadcast_to(jnp.asarray(query_offset), (batch,))[:, None, None] + ends[None, None]
        counts = jnp.clip(-(-ends // block_size), 0, num_blocks).astype(jnp.int32)
        counts = jnp.broadcast_to(counts, (batch, lists, num_rows))
        indices = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32), (*counts.shape, num_blocks))
        return cls(counts, indices, block_size)

    def density(self, visible: Int[Array, "*#lists R"] | None = None) -> Float32[Array, "*lists"]:
        """Number of kept blocks over that of visible blocks, summed over the rows of each list: 1 is dense, 0.1 is 90% sparse.

        Args:
          visible: number of blocks that each row sees, broadcast to `counts`; r + 1 for row r if None, as in causal prefill from
            token 0. Decode passes ceil(lengths / b)[:, None].
        """
        if visible is None:
            visible = jnp.arange(1, self.counts.shape[-1] + 1)
        seen = jnp.broadcast_to(visible, self.counts.shape).sum(-1)
        return self.counts.sum(-1) / jnp.maximum(seen, 1).astype(jnp.float32)

    def check(self, num_key_blocks: int) -> "BlockIndices":
        """Checks the contents of the lists and returns them unchanged.

        Copies the arrays from the device, so it is meant for tests and external input, not for inner loops. Under `jax.jit` nothing
        is checked.

        Raises:
          ValueError: a count outside 0 to N, a listed index outside 0 to Sb - 1, or a list that does not ascend.
        """
        if not _is_concrete(self.counts, self.indices):
            return self
        counts, indices = np.asarray(self.counts), np.asarray(self.indices)
        if counts.size and (counts.min() < 0 or counts.max() > self.width):
            raise ValueError(
                f"BlockIndices: counts must lie from 0 to the width N={self.width}; got {counts.min()} to {counts.max()}."
            )
        listed = indices[np.arange(self.width) < counts[..., None]]
        if listed.size and (listed.min() < 0 or listed.max() >= num_key_blocks):
            raise ValueError(
                f"BlockIndices: indices must lie from 0 to Sb - 1 = {num_key_blocks - 1}; got {listed.min()} to {listed.max()}."
            )
        follows = np.arange(1, self.width) < counts[..., None]
        fallen = np.argwhere(follows & (indices[..., 1:] <= indices[..., :-1]))
        if fallen.size:
            row = tuple(int(i) for i in fallen[0][:-1])
            raise ValueError(
                "BlockIndices: the indices of a row must ascend without repeats; "
                f"got {indices[row][: counts[row]].tolist()} at row {row}. Sort the list and drop repeats."
            )
        return self

"""What a choice of blocks may look at: one layer's queries, keys, gate and cache, while a prompt is read or a token is decoded.

Letters: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head dim, b block size, Tb = ceil(T/b),
Sb = ceil(S/b).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import BlockIndices, select_blocks
from seer_jax.selection.interfaces import LayerCache, LayerGate
from seer_jax.sharding.shard import Shard

PerHead = float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, "heads"]


class CachedKeys(NamedTuple):
    """Keys after RoPE and values where they lie in a cache, so that attention reads them without a copy.

    Fields:
      keys, values: of all layers.
      rows: row of both that each sequence reads.
    """

    keys: Float[Array, "P S K D"]
    values: Float[Array, "P S K D"]
    rows: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillContext:
    """Queries at positions offset .. offset + T - 1 of a prompt, and its keys at positions 0 .. S - 1, in one layer.

    Attributes:
      q, k: before RoPE, after q/k norm where the family has them; `[B, T, H, D]` and `[B, S, K, D]`. k is None where the prompt is read
        in chunks, which keep keys after RoPE alone.
      q_rotated, k_rotated: after RoPE.
      v: values.
      lengths: tokens of each row that count; the rest is right padding, or comes with later chunks.
      prompt_lengths: tokens of each whole prompt, where later chunks may follow; None: `lengths`.
      layer: index of the layer.
      block_size: b, tokens.
      offset: position of the first query, a multiple of b.
      gate: of this layer, or None.
      gate_keys: the gate's compressed keys, Sw of all Sb blocks, where they are known already, for example from a cache.
      cached: the same keys and values where a cache has them; None: they are arrays of their own.
      prepared: what the policy's scorer made of the keys (`Scorer.prepare`), the same for all chunks of query rows.
      shard: of the device whose rows and heads these are, where the model lies on a mesh; None: they are all.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S K D"] | None
    q_rotated: Float[Array, "B T H D"]
    k_rotated: Float[Array, "B S K D"]
    v: Float[Array, "B S K D"]
    lengths: Int[Array, "B"]
    layer: Int[Array, ""]
    block_size: int
    offset: int | Int[Array, ""] = 0
    gate: LayerGate | None = None
    gate_keys: Float32[Array, "B Sw heads C"] | None = None
    prompt_lengths: Int[Array, "B"] | None = None
    cached: "CachedKeys | None" = None
    prepared: Any = None
    shard: Shard | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def num_rows(self) -> int:
        """Tb, block rows of queries."""
        return -(-self.q.shape[1] // self.block_size)

    @property
    def num_key_blocks(self) -> int:
        """Sb."""
        return -(-self.num_keys // self.block_size)

    @property
    def num_keys(self) -> int:
        """S."""
        return self.k_rotated.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.k_rotated.shape[2]

    @property
    def is_whole(self) -> bool:
        """Whether the queries are those of all keys."""
        return isinstance(self.offset, int) and self.offset == 0 and self.q.shape[1] == self.num_keys

    @property
    def required_gate(self) -> LayerGate:
        """The gate; raises ValueError where the model has none."""
        return _required(self.gate, "prefill")

    @property
    def first_row(self) -> int | Int[Array, ""]:
        """Number of the first block row in the prompt."""
        return self.offset // self.block_size

    @property
    def positions(self) -> Int[Array, "1 T"]:
        """Of the queries."""
        return (self.offset + jnp.arange(self.q.shape[1]))[None]

    @property
    def key_positions(self) -> Int[Array, "1 S"]:
        """Of the keys."""
        return jnp.arange(self.num_keys)[None]

    @property
    def valid_queries(self) -> Bool[Array, "B T"]:
        """Which queries are no padding."""
        return self.positions < self.lengths[:, None]

    @property
    def valid_keys(self) -> Bool[Array, "B S"]:
        """Which keys are no padding."""
        return self.key_positions < self.lengths[:, None]

    @property
    def last(self) -> Int[Array, "B 1 1 1"]:
        """Block row that holds a prompt's last token."""
        lengths = self.lengths if self.prompt_lengths is None else self.prompt_lengths
        return ((lengths - 1) // self.block_size)[:, None, None, None]

    @property
    def visible(self) -> Int[Array, "B 1 Tb 1"]:
        """How many key blocks each row sees by causality; 0 behind the sequence."""
        row = self._row
        return jnp.where(row <= self.last, row + 1, 0)

    def keep(self, dense_last_rows: int) -> Bool[Array, "#B 1 Tb Sb"]:
        """Blocks that every rule keeps: each row's own, and every block in the last rows."""
        return self.own | (self._row > self.last - dense_last_rows)

    @property
    def sink_and_own(self) -> Bool[Array, "1 1 Tb Sb"]:
        """Each row's own block and the first one."""
        return self.own | (self._column == 0)

    @property
    def own(self) -> Bool[Array, "1 1 Tb Sb"]:
        """Each row's own block."""
        return self._column == self._row

    def select(self, scores: Float32[Array, "B Hs Tb Sb"], **rule: Any) -> BlockIndices:
        """`select_blocks` among the visible blocks."""
        return select_blocks(scores, block_size=self.block_size, visible=self.visible, **rule)

    def per_head(
        self, scores: Float32[Array, "B Hs Tb Sb"], value: PerHead
    ) -> tuple[Float32[Array, "B _ Tb Sb"], float | Float[Array | np.ndarray, "..."]]:
        """Scores and a rule's value of each head, in shapes that fit each other; lists that heads share are repeated for them."""
        if not jnp.ndim(value):
            return scores, value
        value = jnp.asarray(value)
        return _spread(scores, value, axis=1), value[:, None, None]

    def of_mask(self, mask: Bool[Array, "B Hs Tb Sb"]) -> BlockIndices:
        """Lists of a mask of the caller: causal, and with their own block for rows that would keep none."""
        _check_mask(
            mask, self.batch, {1, self.num_kv_heads, self.q.shape[2]}, (self.num_key_blocks,) * 2, "[B, Hs, Tb, Sb]"
        )
        mask = jax.lax.dynamic_slice_in_dim(mask, self.first_row, self.num_rows, axis=2)
        mask &= self._column < self.visible
        mask |= self.own & ~mask.any(-1, keepdims=True)
        return self.select(jnp.full(mask.shape, -jnp.inf), keep=mask)

    def rows(self, first: int | Int[Array, ""], num_tokens: int) -> "PrefillContext":
        """The context of `num_tokens` queries from block row `first` of this one on."""
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first * self.block_size, slice_size=num_tokens, axis=1
        )
        offset = self.offset + first * self.block_size
        return dataclasses.replace(self, q=cut(self.q), q_rotated=cut(self.q_rotated), offset=offset)

    @property
    def _row(self) -> Int[Array, "1 1 Tb 1"]:
        return (self.first_row + jnp.arange(self.num_rows))[None, None, :, None]

    @property
    def _column(self) -> Int[Array, "1 1 1 Sb"]:
        return jnp.arange(self.num_key_blocks)[None, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeContext:
    """The newest token of each row and the cache that it attends to, in one layer.

    Attributes:
      q, q_rotated: its queries before and after RoPE.
      cache: of this layer; the token is already written, at position `cache.lengths`.
      layer: index of the layer.
      block_size: b, tokens.
      gate: of this layer, or None.
      shard: see `PrefillContext`.
    """

    q: Float[Array, "B 1 H D"]
    q_rotated: Float[Array, "B 1 H D"]
    cache: LayerCache
    layer: Int[Array, ""]
    block_size: int
    gate: LayerGate | None = None
    shard: Shard | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def num_key_blocks(self) -> int:
        """Sb, for which the cache has room."""
        return -(-self.cache.capacity // self.block_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, K, Sb), the shape of scores."""
        return self.batch, self.cache.num_kv_heads, self.num_key_blocks

    @property
    def position(self) -> Int[Array, "B"]:
        """Of the token."""
        return self.cache.lengths

    @property
    def required_gate(self) -> LayerGate:
        """The gate; raises ValueError where the model has none."""
        return _required(self.gate, "decode")

    @property
    def current(self) -> Int[Array, "B 1 1"]:
        """The block that holds the token."""
        return (self.position // self.block_size)[:, None, None]

    def keep(self, dense_last_rows: int) -> Bool[Array, "B K Sb"]:
        """Blocks that every rule keeps: the token's own and the first one."""
        del dense_last_rows  # of prompts
        return self.sink_and_own

    @property
    def sink_and_own(self) -> Bool[Array, "B K Sb"]:
        """The token's own block and the first one."""
        return jnp.broadcast_to((self._column == self.current) | (self._column == 0), self.shape)

    @property
    def own(self) -> Bool[Array, "B K Sb"]:
        """The token's own block."""
        return jnp.broadcast_to(self._column == self.current, self.shape)

    def select(self, scores: Float32[Array, "B K Sb"], **rule: Any) -> BlockIndices:
        """`select_blocks` among the completed blocks."""
        scores = jnp.where(self._column < self.current, scores, -jnp.inf)
        return select_blocks(scores, block_size=self.block_size, **rule)

    def per_head(
        self, scores: Float32[Array, "B K Sb"], value: PerHead
    ) -> tuple[Float32[Array, "B K Sb"], float | Float[Array | np.ndarray, "..."]]:
        """Scores and a rule's value of each key/value head, in shapes that fit each other."""
        return scores, jnp.asarray(value)[:, None] if jnp.ndim(value) else value

    def of_mask(self, mask: Bool[Array, "B K Sb"]) -> BlockIndices:
        """Lists of a mask of the caller: nothing that is to come, and its own block for a token that would keep none."""
        _check_mask(mask, self.batch, {self.shape[1]}, (self.num_key_blocks,), "[B, K, Sb]")
        mask &= self._column <= self.current
        mask |= (self._column == self.current) & ~mask.any(-1, keepdims=True)
        return select_blocks(jnp.full(mask.shape, -jnp.inf), block_size=self.block_size, keep=mask)

    @property
    def _column(self) -> Int[Array, "1 1 Sb"]:
        return jnp.arange(self.num_key_blocks)[None, None]


Context = PrefillContext | DecodeContext


def _required(gate: LayerGate | None, kind: str) -> LayerGate:
    if gate is None:
        raise ValueError(
            f"Blocks can be ranked by a {kind} gate only where the model has one; got none. "
            "Load one (gates=...), train one, or use another scorer."
        )
    return gate


def _check_mask(mask: Array, batch: int, heads: set[int], blocks: tuple[int, ...], letters: str) -> None:
    if mask.ndim != 2 + len(blocks) or mask.shape[0] != batch or mask.shape[1] not in heads or mask.shape[2:] != blocks:
        raise ValueError(
            f"Given.mask must be {letters} in each layer, with {batch} rows, {' or '.join(map(str, sorted(heads)))} lists and "
            f"{', '.join(map(str, blocks))} blocks; got shape {mask.shape}."
        )


def _spread(scores: Array, value: Array | np.ndarray, *, axis: int) -> Array:
    """Scores with as many lists as the value has heads."""
    lists, heads = scores.shape[axis], value.shape[0]
    return scores if heads in (1, lists) else jnp.repeat(scores, heads // lists, axis=axis)

"""The static cache of generation: keys and values, and the compressed keys that gates score.

Nothing outside this module reads the fields that hold them: a cache is filled by prompts (`fill`), appended to by tokens (`append`,
`finish_step`), and read through the view of a layer (`view`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import BlockIndices, pool_blocks, sparse_decode_attention
from seer_jax.checks import whole_number
from seer_jax.gates.configs import DecodeGateConfig, Pool, PrefillGateConfig
from seer_jax.gates.decode import DecodeGate
from seer_jax.models.config import ModelConfig
from seer_jax.selection.context import CachedKeys
from seer_jax.selection.interfaces import LayerCache
from seer_jax.sharding.table import HEADS, KV, ROWS

BLOCKS_TOGETHER = 8  # the kernel that scores the keys of finer gates takes those of whole groups of so many blocks
_MERGE = {Pool.MAX: jnp.maximum, Pool.MIN: jnp.minimum, Pool.AVG: jnp.add}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeGateCache:
    """What the decode gate keeps of the past (SeerAttention-R, arXiv 2506.08889, sec. 3.3).

    Attributes:
      keys: m_k compressed keys per block, each of a pool of s_k tokens (m_k = 1 and s_k = b by default); valid for completed pools.
        Those of a head stand together, as they are read. In bfloat16 beside 16-bit keys and values, since scoring them takes as long as
        reading them; otherwise float32. A block takes m_k C channels per key/value head, beside 2 b D of keys and values.
      pools: of the keys (before RoPE) of the unfinished pool so far, as `pool_blocks` orders them, but sums in place of averages;
        float32. Anything where the pool has no key yet.
    """

    keys: Float[Array, "*maps L B K Sw C"]
    pools: Float[Array, "*maps L B K P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE) and values of S token slots; row i holds `lengths[i]` tokens, the rest is not read.

    Axes named maps come from `jax.lax.map` or `jax.vmap` over whole caches; a cache by itself has none.

    Attributes:
      keys, values: in the model's dtype.
      lengths: tokens in each row.
      decode_gate: of the decode gate, or None where none is used.
      prefill_gate_keys: the prefill gate's compressed keys, float32, for prompts that are read in parts; None where they are not kept.
    """

    keys: Float[Array, "*maps L B S K D"]
    values: Float[Array, "*maps L B S K D"]
    lengths: Int[Array, "*maps B"]
    decode_gate: DecodeGateCache | None = None
    prefill_gate_keys: Float32[Array, "*maps L B Sw heads C"] | None = None

    @classmethod
    def create(
        cls,
        model: ModelConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        *,
        decode_gate: DecodeGateConfig | None = None,
        prefill_gate: PrefillGateConfig | None = None,
    ) -> "Cache":
        """An empty cache for `batch` rows of `capacity` tokens.

        Args:
          model: of the decoder.
          batch, capacity: B and S.
          dtype: of keys and values.
          decode_gate, prefill_gate: gates whose compressed keys are kept.

        Raises:
          ValueError: a size is no integer of at least 1.
        """
        for name, size in (("batch", batch), ("capacity", capacity)):
            whole_number(f"A cache's {name}", size)
        layers, heads, dim = model.num_layers, model.num_kv_heads, model.head_dim
        shape = (layers, batch, capacity, heads, dim)
        decode_cache = prefill_keys = None
        if decode_gate is not None:
            blocks = -(-capacity // decode_gate.block_size)
            if decode_gate.finer_than_release():
                blocks += -blocks % BLOCKS_TOGETHER
            count = blocks * decode_gate.keys_per_block
            kept = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 2 else jnp.float32
            decode_cache = DecodeGateCache(
                keys=jnp.zeros((layers, batch, heads, count, decode_gate.gate_dim), kept),
                pools=jnp.zeros((layers, batch, heads, len(decode_gate.k_pooling) * dim), jnp.float32),
            )
        if prefill_gate is not None:
            key_heads = model.num_heads if prefill_gate.one_linear(dim) else heads
            prefill_keys = jnp.zeros(_prefill_gate_shape(prefill_gate, layers, batch, capacity, key_heads), jnp.float32)
        # XLA merges equal constants and would then copy the one array twice; the barrier prevents that.
        keys, values = (jnp.full(shape, zero) for zero in jax.lax.optimization_barrier([jnp.zeros((), dtype)] * 2))
        return cls(keys, values, jnp.zeros(batch, jnp.int32), decode_cache, prefill_keys)

    @property
    def capacity(self) -> int:
        """S: tokens that each row has room for."""
        return self.keys.shape[2]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.keys.shape[0]

    @property
    def token_arrays(self) -> tuple[Array, Array]:
        """Keys and values, for counting bytes."""
        return self.keys, self.values

    @property
    def gate_key_arrays(self) -> list[Array]:
        """The compressed keys that a decoding step reads, for counting bytes."""
        return [] if self.decode_gate is None else [self.decode_gate.keys]

    @property
    def gate_arrays(self) -> list[Array]:
        """Everything that gates keep, for counting bytes."""
        return jax.tree.leaves((self.decode_gate, self.prefill_gate_keys))

    def specs(self) -> list[P]:
        """How each array is split over a mesh, in the names of `seer_jax.sharding.table`; in the order of `jax.tree.leaves`."""
        of_tokens, of_gate, of_keys = P(None, ROWS, None, KV), P(None, ROWS, KV), P(None, ROWS, None, HEADS)
        gate = [] if self.decode_gate is None else [of_gate] * len(jax.tree.leaves(self.decode_gate))
        return [of_tokens, of_tokens, P(ROWS), *gate, *([] if self.prefill_gate_keys is None else [of_keys])]

    def with_lengths(self, lengths: Int[Array, "B"]) -> "Cache":
        """The same contents with other lengths; what lies behind them is not read, and is overwritten by later tokens.

        Where the cache keeps compressed keys, the lengths must be whole blocks of the decode gate, or those that it has: an unfinished
        pool holds all of its tokens.
        """
        return dataclasses.replace(self, lengths=lengths)

    def with_prefill_gate_keys(self, gate: PrefillGateConfig, heads: int) -> "Cache":
        """The same contents with room for the compressed keys of a prefill gate, unless it is there.

        Args:
          gate: whose keys they are.
          heads: of these keys.
        """
        if self.prefill_gate_keys is not None:
            return self
        layers, batch, capacity = self.keys.shape[:3]
        shape = _prefill_gate_shape(gate, layers, batch, capacity, heads)
        return dataclasses.replace(self, prefill_gate_keys=jnp.zeros(shape, jnp.float32))

    def without_prefill_gate_keys(self) -> "Cache":
        """The same contents for decoding, which does not read the prefill gate's keys."""
        return dataclasses.replace(self, prefill_gate_keys=None)

    def view(self, layer: Int[Array, ""], row: Int[Array, ""] | None = None) -> "CacheView":
        """What one layer may read: of all rows, or of one."""
        return CacheView(self, layer, row)

    @jax.named_scope("cache")
    def fill(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        *,
        start: int | Int[Array, ""] = 0,
        row: int | Int[Array, ""] = 0,
    ) -> "Cache":
        """Writes T tokens of B rows of one layer, from row `row` and position `start` on; k after RoPE. Where they are traced, they must
        leave them room."""
        _check_room("tokens", start, k.shape[1], self.capacity)
        place = _place(layer, row, start, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, k[None].astype(self.keys.dtype), place)
        values = jax.lax.dynamic_update_slice(self.values, v[None].astype(self.values.dtype), place)
        # As in `append`: the chunk that is written is read at once, from the whole cache.
        if not isinstance(start, int):
            keys, values = jax.lax.optimization_barrier((keys, values))
        return dataclasses.replace(self, keys=keys, values=values)

    @jax.named_scope("cache")
    def fill_decode_gate(
        self,
        layer: Int[Array, ""],
        gate: DecodeGate,
        k: Float[Array, "B T K D"],
        lengths: Int[Array, "B"],
        *,
        start: int | Int[Array, ""] = 0,
        row: int | Int[Array, ""] = 0,
    ) -> "Cache":
        """Compresses the keys of a prompt, or of a chunk of it from position `start` on, a multiple of the gate's blocks; k before RoPE.

        They are those of B rows from row `row` on. The unfinished last pool goes to the pools, in the chunk that has it.
        """
        if self.decode_gate is None:
            return self
        kinds, size, tokens = gate.config.k_pooling, gate.config.key_pool, k.shape[1]
        compressed = jnp.swapaxes(gate.keys(k, (start + jnp.arange(tokens))[None]), 1, 2)
        first = lengths // size * size - start  # token of this chunk
        unfinished = first[:, None] + jnp.arange(size)[None]
        last = jnp.take_along_axis(k, jnp.clip(unfinished, 0, tokens - 1)[..., None, None], axis=1)
        pools = pool_blocks(last, kinds, block_size=size, valid=unfinished < (lengths - start)[:, None])[:, 0]
        pools = _scale_averages(pools, kinds, (lengths % size)[:, None, None])
        cache, pools, at = self.decode_gate, pools[None], _place(layer, row, 0, 0)
        if not isinstance(start, int) or start:
            here = ((first >= 0) & (first < tokens))[:, None, None]
            pools = jnp.where(here, pools, jax.lax.dynamic_slice(cache.pools, at, pools.shape))
        place = _place(layer, row, 0, start // size, 0)
        keys = jax.lax.dynamic_update_slice(cache.keys, compressed[None].astype(cache.keys.dtype), place)
        pools = jax.lax.dynamic_update_slice(cache.pools, pools, at)
        return dataclasses.replace(self, decode_gate=DecodeGateCache(keys, pools))

    @jax.named_scope("cache")
    def append_prefill_gate_keys(
        self,
        layer: Int[Array, ""],
        keys: Float32[Array, "B n heads C"],
        *,
        first_key: int | Int[Array, ""],
        row: int | Int[Array, ""] = 0,
    ) -> "Cache":
        """Writes n of the prefill gate's compressed keys of B rows of one layer, from row `row` and key `first_key` on: m_k times the
        number of its block."""
        assert self.prefill_gate_keys is not None
        _check_room("compressed keys", first_key, keys.shape[1], self.prefill_gate_keys.shape[2])
        place = _place(layer, row, first_key, 0, 0)
        return dataclasses.replace(
            self, prefill_gate_keys=jax.lax.dynamic_update_slice(self.prefill_gate_keys, keys[None], place)
        )

    @jax.named_scope("cache")
    def append(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B K D"],
        v: Float[Array, "B K D"],
        active: Bool[Array, "B"] | None = None,
    ) -> "Cache":
        """Writes one token of every row of one layer, at the row's length, which `finish_step` raises after the last layer.

        Args:
          layer: its index.
          k, v: k after RoPE.
          active: rows that are written; None: all.
        """
        place = self.lengths if active is None else jnp.where(active, self.lengths, self.capacity)  # beyond: dropped
        at = (layer, jnp.arange(k.shape[0]), place)
        keys = self.keys.at[at].set(k.astype(self.keys.dtype))
        values = self.values.at[at].set(v.astype(self.values.dtype))
        # Without a barrier a CPU writes a single row twice, once for its next reader, and copies the whole cache in each layer.
        keys, values = jax.lax.optimization_barrier((keys, values))
        return dataclasses.replace(self, keys=keys, values=values)

    @jax.named_scope("cache")
    def finish_step(
        self, gate: DecodeGate | None, k: Float[Array, "L B K D"], active: Bool[Array, "B"] | None = None
    ) -> "Cache":
        """Counts the token that `append` wrote, and adds its keys to what the decode gate keeps.

        All layers at once, after the last one: no layer scores its unfinished pool. A pool that the token completes is compressed.

        Args:
          gate: of all layers.
          k: of each layer, before RoPE.
          active: rows that `append` wrote; None: all.
        """
        decode_gate = self.decode_gate
        if gate is not None and decode_gate is not None:
            decode_gate = self._grow(gate, decode_gate, k, active)
        more = 1 if active is None else active.astype(self.lengths.dtype)
        return dataclasses.replace(self, lengths=self.lengths + more, decode_gate=decode_gate)

    def _grow(
        self, gate: DecodeGate, cache: DecodeGateCache, k: Float[Array, "L B K D"], active: Bool[Array, "B"] | None
    ) -> DecodeGateCache:
        kinds, size = gate.config.k_pooling, gate.config.key_pool
        pool, key = self.lengths // size, k.astype(jnp.float32)
        parts = zip(kinds, jnp.split(cache.pools, len(kinds), axis=-1), strict=True)
        merged = jnp.concatenate([_MERGE[kind](part, key) for kind, part in parts], axis=-1)
        is_first = (self.lengths % size == 0)[None, :, None, None]
        pools = jnp.where(is_first, jnp.tile(key, len(kinds)), merged)
        pooled = _scale_averages(pools, kinds, 1 / size)[:, :, None]
        compressed = jax.vmap(DecodeGate.compress, (0, 0, None))(gate, pooled, (pool * size)[:, None])[:, :, 0]
        complete = self.lengths % size == size - 1
        if active is not None:
            complete, pools = complete & active, jnp.where(active[None, :, None, None], pools, cache.pools)
        return DecodeGateCache(_write_keys(cache.keys, compressed, jnp.where(complete, pool, -1)), pools)


@dataclasses.dataclass(frozen=True)
class CacheView(LayerCache):
    """What one layer may read of a cache.

    Attributes:
      cache: of all layers.
      layer: index of the layer.
      row: the only row that may be read; None: all.
    """

    cache: Cache
    layer: Int[Array, ""]
    row: Int[Array, ""] | None = None

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def num_kv_heads(self) -> int:
        return self.cache.keys.shape[3]

    @property
    def lengths(self) -> Int[Array, "B"]:
        return self.cache.lengths if self.row is None else self.cache.lengths[self.row][None]

    @property
    def keys(self) -> Float[Array, "B S K D"]:
        return self._of_layer(self.cache.keys)

    @property
    def values(self) -> Float[Array, "B S K D"]:
        """Values, a copy of the layer's part like `keys`."""
        return self._of_layer(self.cache.values)

    @property
    def in_place(self) -> CachedKeys:
        """Keys and values for attention that reads them where they lie."""
        # A slice of this layer would be a copy of its whole cache, which takes longer than reading it.
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in self.cache.token_arrays)
        batch = len(self.cache.lengths)
        return CachedKeys(
            keys, values, self.layer * batch + (jnp.arange(batch) if self.row is None else self.row[None])
        )

    @property
    def gate_key_rows(self) -> tuple[Float[Array, "P Sw K C"], Int[Array, ""]]:
        if self.cache.decode_gate is None:
            raise ValueError(
                "Blocks can be ranked by the decode gate only with a cache that keeps its keys; got one without. "
                "Make it by Transformer.make_cache of a model that has the gate."
            )
        keys, batch = self.cache.decode_gate.keys, len(self.lengths)
        # Indexed by layer, XLA would lay out the cache in an order of its own, and copy it at each end of a loop.
        return jnp.swapaxes(keys.reshape(-1, *keys.shape[2:]), 1, 2), self.layer * batch

    @property
    def prefill_gate_keys(self) -> Float32[Array, "B Sw heads C"] | None:
        keys = self.cache.prefill_gate_keys
        return None if keys is None else self._of_layer(keys)

    def _of_layer(self, x: Array) -> Array:
        """The layer's part of an array of all layers and rows."""
        return x[self.layer] if self.row is None else x[self.layer, self.row][None]

    def attend(self, q: Float[Array, "B H D"], blocks: BlockIndices | None) -> Float[Array, "B H D"]:
        keys, values, rows = self.in_place
        out = sparse_decode_attention(q, keys, values, blocks, lengths=self.lengths + 1, cache_rows=rows)
        assert isinstance(out, jax.Array)  # without return_lse
        return out


def _prefill_gate_shape(
    gate: PrefillGateConfig, layers: int, batch: int, capacity: int, heads: int
) -> tuple[int, int, int, int, int]:
    """Shape of the compressed keys, see `Cache`."""
    return layers, batch, -(-capacity // gate.block_size) * gate.keys_per_block, heads, gate.gate_dim


def _place(*indices: int | Int[Array, ""]) -> list[Int[Array, ""]]:
    """Indices of one type, as slices need them, also where JAX's integers have 64 bits."""
    return [jnp.asarray(i, jnp.int32) for i in indices]


def _check_room(unit: str, start: int | Array, size: int, capacity: int) -> None:
    """Raises ValueError where a write would reach beyond the cache, as far as its place is known: XLA would move it, unasked."""
    first = start if isinstance(start, int) else 0
    if first < 0 or first + size > capacity:
        raise ValueError(
            f"A cache of {capacity} {unit} must have room for {size} from {first} on. Make a larger cache."
        )


def _scale_averages(
    pools: Float[Array, "*L B K P"], kinds: tuple[Pool, ...], factor: Int[Array, "B 1 1"] | float
) -> Float[Array, "*L B K P"]:
    """From averages to sums or back; maxima and minima stay."""
    parts = zip(kinds, jnp.split(pools, len(kinds), axis=-1), strict=True)
    return jnp.concatenate([part * factor if kind is Pool.AVG else part for kind, part in parts], axis=-1)


def _write_keys(
    cache: Float[Array, "L B K Sw C"], keys: Float[Array, "L B K C"], place: Int[Array, "B"]
) -> Float[Array, "L B K Sw C"]:
    """Writes one key of each layer, row and head, at `place` among its keys; nothing where that is negative.

    As rows of a matrix: XLA would scatter into an array of five axes in an order of its own, and copy the whole cache for it.
    """
    layers, batch, heads, count, dim = cache.shape
    row = jnp.arange(layers * batch * heads).reshape(layers, batch, heads)
    place = jnp.broadcast_to(place[:, None], row.shape)
    place = jnp.where(place >= 0, row * count + place, row.size * count + row)  # beyond the end: dropped
    new = keys.reshape(-1, dim).astype(cache.dtype)
    matrix = cache.reshape(-1, dim).at[place.reshape(-1)].set(new, mode="drop", unique_indices=True)
    return matrix.reshape(cache.shape)

"""The static cache of generation: keys and values, and the compressed keys that the decode gate scores."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import pool_blocks
from seer_jax.gates.configs import DecodeGateConfig, Pool
from seer_jax.models.config import ModelConfig
from seer_jax.gates.gate import DecodeGate

_MERGE = {Pool.MAX: jnp.maximum, Pool.MIN: jnp.minimum, Pool.AVG: jnp.add}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateCache:
    """What the decode gate keeps of the past (SeerAttention-R, arXiv 2506.08889, sec. 3.3).

    Attributes:
      keys: one compressed key per block; valid for completed blocks. Those of a head stand together, as they are read. In bfloat16
        beside 16-bit keys and values: scoring them takes as long as reading them. Else float32.
      pools: of the keys (before RoPE) of the unfinished block so far, as `pool_blocks` orders them, but sums in place of averages;
        float32. Anything where the block has no key yet.
    """

    keys: Float[Array, "*maps L B K Sb C"]
    pools: Float[Array, "*maps L B K P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE) and values of S token slots; row i holds `lengths[i]` tokens, the rest is not read.

    Axes named maps come from `jax.lax.map` or `jax.vmap` over whole caches; there are none else.

    Attributes:
      keys, values: in the model's dtype.
      lengths: tokens in each row.
      gate: of the decode gate, or None where none is used.
    """

    keys: Float[Array, "*maps L B S K D"]
    values: Float[Array, "*maps L B S K D"]
    lengths: Int[Array, "*maps B"]
    gate: GateCache | None = None

    @classmethod
    def create(
        cls, model: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, gate: DecodeGateConfig | None = None
    ) -> "Cache":
        """An empty cache for `batch` rows of `capacity` tokens."""
        if batch < 1 or capacity < 1:
            raise ValueError(f"A cache needs at least one row and one token; got batch={batch}, capacity={capacity}.")
        shape = (model.num_layers, batch, capacity, model.num_kv_heads, model.head_dim)
        gate_cache = None
        if gate is not None:
            blocks = -(-capacity // gate.block_size)
            gate_cache = GateCache(
                keys=jnp.zeros(
                    (*shape[:2], model.num_kv_heads, blocks, gate.gate_dim),
                    jnp.bfloat16 if jnp.dtype(dtype).itemsize == 2 else jnp.float32,
                ),
                pools=jnp.zeros((*shape[:2], shape[3], len(gate.k_pooling) * shape[4]), jnp.float32),
            )
        # Two zeros that a compiler can't take for one: it would make one array of them, and then two copies of that.
        keys, values = (jnp.full(shape, zero) for zero in jax.lax.optimization_barrier([jnp.zeros((), dtype)] * 2))
        return cls(keys, values, jnp.zeros(batch, jnp.int32), gate_cache)

    @property
    def capacity(self) -> int:
        """S: tokens that each row has room for."""
        return self.keys.shape[2]

    def fill(self, layer: Int[Array, ""], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]) -> "Cache":
        """Writes the first T tokens of every row of one layer."""
        start = (layer, 0, 0, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None].astype(self.keys.dtype), start),
            values=jax.lax.dynamic_update_slice(self.values, v[None].astype(self.values.dtype), start),
        )

    def append(self, layer: Int[Array, ""], k: Float[Array, "B K D"], v: Float[Array, "B K D"]) -> "Cache":
        """Writes one token of every row of one layer, at the row's length."""
        at = (layer, jnp.arange(k.shape[0]), self.lengths)
        keys = self.keys.at[at].set(k.astype(self.keys.dtype))
        values = self.values.at[at].set(v.astype(self.values.dtype))
        # A CPU would write a single row twice, once for who reads it next, and copy the whole cache in each layer for that.
        keys, values = jax.lax.optimization_barrier((keys, values))
        return dataclasses.replace(self, keys=keys, values=values)

    def fill_gate(
        self, layer: Int[Array, ""], gate: DecodeGate, k: Float[Array, "B T K D"], lengths: Int[Array, "B"]
    ) -> "Cache":
        """Compresses the blocks of a prompt; k before RoPE. The unfinished last block goes to `pools`."""
        if self.gate is None:
            return self
        kinds, b = gate.config.k_pooling, gate.config.block_size
        pooled = pool_blocks(k, kinds, block_size=b)
        compressed = jnp.swapaxes(gate.keys(pooled, jnp.arange(pooled.shape[1])[None] * b), 1, 2)
        unfinished = (lengths // b)[:, None] * b + jnp.arange(b)[None]
        last = jnp.take_along_axis(k, jnp.minimum(unfinished, k.shape[1] - 1)[..., None, None], axis=1)
        pools = pool_blocks(last, kinds, block_size=b, valid=unfinished < lengths[:, None])[:, 0]
        pools = _scale_averages(pools, kinds, (lengths % b)[:, None, None])
        return dataclasses.replace(
            self,
            gate=GateCache(
                keys=jax.lax.dynamic_update_slice(
                    self.gate.keys, compressed[None].astype(self.gate.keys.dtype), (layer, 0, 0, 0, 0)
                ),
                pools=self.gate.pools.at[layer].set(pools),
            ),
        )

    def gate_keys(self, layer: Int[Array, ""]) -> Float[Array, "B Sb K C"]:
        """The compressed keys of a layer."""
        assert self.gate is not None
        batch = len(self.lengths)
        # Indexed by layer, XLA would lay out the cache in an order of its own, and copy it at each end of a loop.
        rows = self.gate.keys.reshape(-1, *self.gate.keys.shape[2:])
        return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(rows, layer * batch, batch), 1, 2)

    def append_gate(self, gate: DecodeGate, k: Float[Array, "L B K D"]) -> "Cache":
        """Adds the key of the token at position `lengths` to the unfinished block, and compresses the block where that completes it.

        All layers at once, after the last one: no layer scores its unfinished block.

        Args:
          gate: of all layers.
          k: of each layer, before RoPE.
        """
        if self.gate is None:
            return self
        kinds, b = gate.config.k_pooling, gate.config.block_size
        block, key = self.lengths // b, k.astype(jnp.float32)
        parts = zip(kinds, jnp.split(self.gate.pools, len(kinds), axis=-1), strict=True)
        merged = jnp.concatenate([_MERGE[kind](part, key) for kind, part in parts], axis=-1)
        is_first = (self.lengths % b == 0)[None, :, None, None]
        pools = jnp.where(is_first, jnp.tile(key, len(kinds)), merged)
        pooled = _scale_averages(pools, kinds, 1 / b)[:, :, None]
        compressed = jax.vmap(DecodeGate.keys, (0, 0, None))(gate, pooled, (block * b)[:, None])[:, :, 0]
        complete = self.lengths % b == b - 1
        keys = _write_keys(self.gate.keys, compressed, jnp.where(complete, block, -1))
        return dataclasses.replace(self, gate=GateCache(keys, pools))


def _scale_averages(
    pools: Float[Array, "*L B K P"], kinds: tuple[Pool, ...], factor: Int[Array, "B 1 1"] | float
) -> Float[Array, "*L B K P"]:
    """From averages to sums or back; maxima and minima stay."""
    parts = zip(kinds, jnp.split(pools, len(kinds), axis=-1), strict=True)
    return jnp.concatenate([part * factor if kind is Pool.AVG else part for kind, part in parts], axis=-1)


def _write_keys(
    cache: Float[Array, "L B K Sb C"], keys: Float[Array, "L B K C"], block: Int[Array, "B"]
) -> Float[Array, "L B K Sb C"]:
    """Writes one key of each layer, row and head, at block number `block`; nothing where that is negative.

    As rows of a matrix: XLA would scatter into an array of five axes in an order of its own, and copy the whole cache for it.
    """
    layers, batch, heads, blocks, dim = cache.shape
    row = jnp.arange(layers * batch * heads).reshape(layers, batch, heads)
    block = jnp.broadcast_to(block[:, None], row.shape)
    place = jnp.where(block >= 0, row * blocks + block, row.size * blocks + row)  # beyond the end: dropped
    new = keys.reshape(-1, dim).astype(cache.dtype)
    matrix = cache.reshape(-1, dim).at[place.reshape(-1)].set(new, mode="drop", unique_indices=True)
    return matrix.reshape(cache.shape)

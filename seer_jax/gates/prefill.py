"""The prefill gate of SeerAttention: one choice of blocks per query head and query block.

Gates are stacked over layers: each weight has a leading axis L, and the model takes one layer's at a time. Their arithmetic is float32 at
full precision, whatever the dtype of the base model; on GPUs the products of their gradients are TF32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import pool_blocks, score_blocks, score_sub_blocks
from pallas_kernels.precision import precise_einsum
from seer_jax.gates.checks import check_made_of, check_vectors
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.gates.projections import initial_projection, project
from seer_jax.gates.recommendation import Recommending
from seer_jax.models.config import ModelConfig
from seer_jax.models.layers import GateParam
from seer_jax.models.rope import apply_rope


class PrefillGate(Recommending, nnx.Module):
    """score[h, i, j] = rope(Pq(q)_i Wq) . rope(Pk(k)_j Wk) / sqrt(C) for j <= i (SeerAttention, arXiv 2410.13276, sec. 3.1).

    Where pools are smaller than blocks, a row of blocks has m_q queries and a block m_k keys, and score[h, i, j] is the logarithm of
    the largest share that block j has in the softmax of a query of row i over the keys up to it (`score_sub_blocks`).

    Both gates have one interface: `queries`, `keys` and `logits`, each of one layer (weights without their L axis). Keys can be kept and
    scored later against further queries. Letters: s_q and s_k tokens per query and key; Tu = ceil(T / s_q) and Sw = ceil(S / s_k),
    which are Tb and Sb where pools are blocks.

    Attributes:
      linear_q: `[L, H, |Pq| D, C]`, or None in the one-linear form.
      linear_k: `[L, K, |Pk| D, C]`, in the one-linear form `[L, H, |Pk| D, C]`.
      recommended: the policy to use the gate with, or None.
      distilled_on: the target that it was distilled on, "max" or "mass", or None.
    """

    phase = "prefill"

    def __init__(self, config: PrefillGateConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        check_made_of(PrefillGate, PrefillGateConfig, config, model, rngs)
        self.config, self.model = config, model
        one, dim, gate_dim = config.one_linear(model.head_dim), model.head_dim, config.gate_dim
        layers, heads, kv_heads = model.num_layers, model.num_heads, model.num_kv_heads
        q_shape = (layers, heads, len(config.q_pooling) * dim, gate_dim)
        k_shape = (layers, heads if one else kv_heads, len(config.k_pooling) * dim, gate_dim)
        make = functools.partial(initial_projection, head_dim=dim)
        self.linear_q = None if one else GateParam(make(rngs.params(), q_shape, config.q_pooling))
        self.linear_k = GateParam(make(rngs.params(), k_shape, config.k_pooling))

    @property
    def num_lists(self) -> int:
        return self.model.num_heads

    @property
    def num_key_heads(self) -> int:
        """Heads of the compressed keys: H in the one-linear form, K in the other one."""
        return self.linear_k.shape[-3]

    def queries(
        self, q: Float[Array, "B T H D"], positions: Int[Array, "#B T"], valid: Bool[Array, "#B T"] | None = None
    ) -> Float32[Array, "B Tu H C"]:
        """The gate's queries, one per pool of s_q tokens and query head.

        Args:
          q: before RoPE (after q/k norm where the family has them); T counts from the start of a block.
          positions: of the tokens.
          valid: tokens that count, see `pool_blocks`.
        """
        check_vectors("q", q, self.model.num_heads, self.model.head_dim, positions, self.linear_k.shape)
        size = self.config.query_pool
        pooled = pool_blocks(q, self.config.q_pooling, block_size=size, valid=valid)
        if self.linear_q is not None:
            pooled = precise_einsum("bnhp,hpc->bnhc", pooled, self.linear_q[...])
        return apply_rope(pooled, positions[:, ::size], self.model.rope)

    def keys(
        self, k: Float[Array, "B S K D"], positions: Int[Array, "#B S"], valid: Bool[Array, "#B S"] | None = None
    ) -> Float32[Array, "B Sw heads C"]:
        """Compressed keys, one per pool of s_k tokens and key head (`num_key_heads`); arguments as in `queries`."""
        check_vectors("k", k, self.model.num_kv_heads, self.model.head_dim, positions, self.linear_k.shape)
        size = self.config.key_pool
        pooled = pool_blocks(k, self.config.k_pooling, block_size=size, valid=valid)
        first_positions = positions[:, ::size]
        if self.linear_q is not None:
            return apply_rope(project(pooled, self.linear_k[...]), first_positions, self.model.rope)
        weight = self.linear_k[...].reshape(-1, self.model.group_size, *self.linear_k.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(*weight.shape[:2], -1)  # [K, P, G C]
        # Without a barrier XLA would keep a second, transposed copy of the weights of all layers.
        weight = jax.lax.optimization_barrier(weight)
        keys = precise_einsum("bnkp,kpc->bnkc", pooled, weight)
        return apply_rope(keys.reshape(*keys.shape[:2], self.model.num_heads, -1), first_positions, self.model.rope)

    def seen(
        self,
        places: Int[Array, "#B T"],
        valid: Bool[Array, "#B T"] | None = None,
        starts: Int[Array, "#B T"] | None = None,
    ) -> Int[Array, "#B Tu 2"]:
        """The keys [first, end) that each query sees: those whose first token is no later than the query's last valid one; none where
        it has none.

        Args:
          places: of the query tokens among the key tokens; T counts from the start of a block.
          valid: tokens that count.
          starts: place of the first token of each token's sequence, a multiple of b; None: 0.
        """
        size, pool = self.config.query_pool, self.config.key_pool
        pad = -places.shape[1] % size
        last = places if valid is None else jnp.where(valid, places, -1)
        last = jnp.pad(last, ((0, 0), (0, pad)), constant_values=-1).reshape(len(last), -1, size).max(-1)
        first = jnp.zeros_like(last) if starts is None else starts[:, ::size] // pool
        return jnp.stack(jnp.broadcast_arrays(first, jnp.where(last < 0, 0, last // pool + 1)), axis=-1)

    def logits(
        self,
        queries: Float32[Array, "B Tu H C"],
        keys: Float32[Array, "B Sw heads C"],
        *,
        row_offset: int | Int[Array, ""] = 0,
        seen: Int[Array, "#B Tu 2"] | None = None,
    ) -> Float32[Array, "B H Tb Sb"]:
        """Logits of query blocks against key blocks.

        Where pools are blocks, those above the diagonal, j > row_offset + i, mean nothing: leaving them as they are costs less than
        masking them. Otherwise they are -inf.

        Args:
          row_offset: number of the first query block in the sequence.
          seen: the keys that each query sees; None: up to its last token, all of which are valid. Used only where a pool is smaller
            than a block.
        """
        config = self.config
        if config.queries_per_row == config.keys_per_block == 1:
            return score_blocks(queries, keys, causal=True, row_offset=row_offset)
        if seen is None:
            tokens = queries.shape[1] * config.query_pool
            seen = self.seen(row_offset * config.block_size + jnp.arange(tokens)[None])
        return score_sub_blocks(
            queries,
            keys,
            seen=seen,
            queries_per_row=config.queries_per_row,
            keys_per_block=config.keys_per_block,
            join=config.join,
        )

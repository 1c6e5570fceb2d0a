"""The prefill gate of SeerAttention: one choice of blocks per query head and query block.

Gates are stacked over layers: each weight has a leading axis L, and the model takes one layer's at a time. Their arithmetic is float32 at
full precision, whatever the dtype of the base model; on GPUs the products of their gradients are TF32.
"""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import pool_blocks, score_blocks
from pallas_kernels.precision import precise_einsum
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.gates.projections import initial_projection, project
from seer_jax.gates.recommendation import Recommending
from seer_jax.models.config import ModelConfig
from seer_jax.models.layers import GateParam
from seer_jax.models.rope import apply_rope


class PrefillGate(Recommending, nnx.Module):
    """score[h, i, j] = rope(Pq(q)_i Wq) . rope(Pk(k)_j Wk) / sqrt(C) for j <= i (SeerAttention, arXiv 2410.13276, sec. 3.1).

    Both gates have one interface: `queries`, `keys` and `logits`, each of one layer (weights without their L axis). Keys can be kept and
    scored later against further queries.

    Attributes:
      linear_q: `[L, H, |Pq| D, C]`, or None in the one-linear form.
      linear_k: `[L, K, |Pk| D, C]`, in the one-linear form `[L, H, |Pk| D, C]`.
      recommended: the policy to use the gate with, or None.
    """

    phase = "prefill"

    def __init__(self, config: PrefillGateConfig, model: ModelConfig, *, rngs: nnx.Rngs):
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
    ) -> Float32[Array, "B Tb H C"]:
        """The gate's queries, one per block and query head.

        Args:
          q: before RoPE (after q/k norm where the family has them); T counts from the start of a block.
          positions: of the tokens.
          valid: tokens that count, see `pool_blocks`.
        """
        pooled = pool_blocks(q, self.config.q_pooling, block_size=self.config.block_size, valid=valid)
        if self.linear_q is not None:
            pooled = precise_einsum("bnhp,hpc->bnhc", pooled, self.linear_q[...])
        return self._rotated(pooled, positions)

    def keys(
        self, k: Float[Array, "B S K D"], positions: Int[Array, "#B S"], valid: Bool[Array, "#B S"] | None = None
    ) -> Float32[Array, "B Sb heads C"]:
        """Compressed keys, one per block and key head (`num_key_heads`); arguments as in `queries`."""
        pooled = pool_blocks(k, self.config.k_pooling, block_size=self.config.block_size, valid=valid)
        if self.linear_q is not None:
            return self._rotated(project(pooled, self.linear_k[...]), positions)
        weight = self.linear_k[...].reshape(-1, self.model.group_size, *self.linear_k.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(*weight.shape[:2], -1)  # [K, P, G C]
        # Without a barrier XLA would keep a second, transposed copy of the weights of all layers.
        weight = jax.lax.optimization_barrier(weight)
        keys = precise_einsum("bnkp,kpc->bnkc", pooled, weight)
        return self._rotated(keys.reshape(*keys.shape[:2], self.model.num_heads, -1), positions)

    def logits(
        self,
        queries: Float32[Array, "B Tb H C"],
        keys: Float32[Array, "B Sb heads C"],
        *,
        row_offset: int | Int[Array, ""] = 0,
    ) -> Float32[Array, "B H Tb Sb"]:
        """Logits of query blocks against key blocks.

        Those above the diagonal, j > row_offset + i, mean nothing: leaving them as they are costs less than masking them.

        Args:
          row_offset: number of the first query block in the sequence.
        """
        return score_blocks(queries, keys, causal=True, row_offset=row_offset)

    def _rotated(
        self, x: Float32[Array, "B n heads C"], positions: Int[Array, "#B T"]
    ) -> Float32[Array, "B n heads C"]:
        """Rotated at the first token of each block."""
        return apply_rope(x, positions[:, :: self.config.block_size], self.model.rope)

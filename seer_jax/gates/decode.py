"""The decode gate of SeerAttention-R: one choice of blocks per key/value head and query token. Stacked over layers like the prefill gate."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import pool_blocks, score_blocks, score_sub_blocks
from pallas_kernels.checks import check_array
from seer_jax.gates.checks import check_made_of, check_vectors
from seer_jax.gates.configs import DecodeGateConfig, Pool, QueryReduction
from seer_jax.gates.projections import initial_projection, project, project_few
from seer_jax.gates.recommendation import Recommending
from seer_jax.models.config import ModelConfig
from seer_jax.models.layers import GateParam, rms_norm
from seer_jax.models.rope import apply_rope

NORM_EPS = 1e-6


class DecodeGate(Recommending, nnx.Module):
    """score[k, t, j] = rope(norm(Wq q_t)) . rope(norm(Wk Pk(k)_j)) / sqrt(C) for j < floor(t / b) (SeerAttention-R, arXiv
    2506.08889, sec. 3).

    Where each query head has a query of its own, or key pools are smaller than blocks, score[k, t, j] is the logarithm of block j's
    share in the softmax over the keys of completed blocks, joined over the group's heads (`score_sub_blocks`). Letters: s_k tokens
    per key, m_k = b / s_k keys per block, Sw keys, which are Sb where pools are blocks.

    Attributes:
      linear_q: `[L, K, G, D, C]` (PROJ, HEADS), `[L, K, D, C]` (AVG_PROJ) or None (AVG).
      linear_k: `[L, K, |Pk| D, C]`.
      q_norm, k_norm: `[L, C]` or None.
      recommended: the policy to use the gate with, or None.
      distilled_on: the target that it was distilled on, "max" or "mass", or None.
    """

    phase = "decode"

    def __init__(self, config: DecodeGateConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        check_made_of(DecodeGate, DecodeGateConfig, config, model, rngs)
        self.config, self.model = config, model
        layers, kv_heads, group = model.num_layers, model.num_kv_heads, model.group_size
        dim, gate_dim = model.head_dim, config.gate_dim
        if config.query_reduction is QueryReduction.AVG and gate_dim != dim:
            raise ValueError(
                f"query_reduction=Qavg takes averages of queries as they are, so DecodeGateConfig.gate_dim must be the model's head dim, "
                f"{dim}; got {gate_dim}. Set DecodeGateConfig.gate_dim={dim}, or query_reduction=Qavgproj."
            )
        if config.start_layer >= layers:
            raise ValueError(f"start_layer must leave a sparse layer: below {layers}; got {config.start_layer}.")
        make = functools.partial(initial_projection, head_dim=dim)
        shapes = {
            QueryReduction.PROJ: (layers, kv_heads, group, dim, gate_dim),
            QueryReduction.HEADS: (layers, kv_heads, group, dim, gate_dim),
            QueryReduction.AVG_PROJ: (layers, kv_heads, dim, gate_dim),
        }
        q_shape = shapes.get(config.query_reduction)
        scale = 1 / group if config.query_reduction is QueryReduction.PROJ else 1
        self.linear_q = None if q_shape is None else GateParam(make(rngs.params(), q_shape, (Pool.AVG,)) * scale)
        self.linear_k = GateParam(
            make(rngs.params(), (layers, kv_heads, len(config.k_pooling) * dim, gate_dim), config.k_pooling)
        )
        self.q_norm = GateParam(jnp.ones((layers, gate_dim), jnp.float32)) if config.normalizes else None
        self.k_norm = GateParam(jnp.ones((layers, gate_dim), jnp.float32)) if config.normalizes else None

    @property
    def num_lists(self) -> int:
        return self.model.num_kv_heads

    def _query_heads(self, shape: tuple[int, ...]) -> int:
        """Query heads that queries of a shape must have: the model's, or where devices of a mesh share a key/value head all of its group."""
        kv_heads, reduction = self.model.num_kv_heads, self.config.query_reduction
        if reduction in (QueryReduction.PROJ, QueryReduction.HEADS):
            assert self.linear_q is not None
            return kv_heads * self.linear_q.shape[-3]
        return shape[2] if kv_heads == 1 and len(shape) == 4 else self.model.num_heads

    def queries(self, q: Float[Array, "B T H D"], positions: Int[Array, "#B T"]) -> Float32[Array, "B T heads C"]:
        """The gate's queries, one per token and key/value head, with HEADS per token and query head; q before RoPE."""
        check_array("gate", "q", q)
        check_vectors("q", q, self._query_heads(q.shape), self.model.head_dim, positions, self.linear_k.shape)
        if self.config.has_head_queries:
            assert self.linear_q is not None
            weight = self.linear_q[...]
            out = project_few(q.astype(jnp.float32), weight.reshape(-1, *weight.shape[2:]))
            return self._finish(out, self.q_norm, positions)
        grouped = q.astype(jnp.float32).reshape(*q.shape[:2], self.model.num_kv_heads, -1, q.shape[-1])
        if self.linear_q is None:
            out = grouped.mean(3)
        elif self.config.query_reduction is QueryReduction.PROJ:
            weight = self.linear_q[...]
            flat = grouped.reshape(*grouped.shape[:3], -1)
            out = project_few(flat, weight.reshape(len(weight), -1, weight.shape[-1]))
        else:
            out = project_few(grouped.mean(3), self.linear_q[...])
        return self._finish(out, self.q_norm, positions)

    def keys(
        self, k: Float[Array, "B S K D"], positions: Int[Array, "#B S"], valid: Bool[Array, "#B S"] | None = None
    ) -> Float32[Array, "B Sw K C"]:
        """Compressed keys, one per pool of s_k tokens and key/value head.

        Args:
          k: before RoPE; S counts from the start of a block.
          positions: of the tokens; a key is rotated at the first token of its pool.
          valid: tokens that count, see `pool_blocks`.
        """
        check_vectors("k", k, self.model.num_kv_heads, self.model.head_dim, positions, self.linear_k.shape)
        size = self.config.key_pool
        pooled = pool_blocks(k, self.config.k_pooling, block_size=size, valid=valid)
        return self.compress(pooled, positions[:, ::size])

    def compress(
        self, pooled: Float32[Array, "B Sw K P"], first_positions: Int[Array, "#B Sw"]
    ) -> Float32[Array, "B Sw K C"]:
        """Compressed keys from pooled ones (`pool_blocks`); positions are those of each pool's first token."""
        return self._finish(project(pooled, self.linear_k[...]), self.k_norm, first_positions)

    def logits(
        self,
        queries: Float32[Array, "B T heads C"],
        keys: Float[Array, "P Sw K C"],
        *,
        completed: Int[Array, "B T"],
        first: int | Int[Array, "#B T"] = 0,
        first_row: Int[Array, ""] | None = None,
    ) -> Float32[Array, "B K T Sb"]:
        """Logits of tokens against key blocks, -inf before block `first` and from block `completed` on.

        Args:
          completed: number of completed earlier blocks of each query token, floor(t / b).
          first: block in which the token's sequence starts.
          first_row: where the B rows of keys begin among P; None: keys has B rows.
        """
        config = self.config
        check_array("gate", "completed", completed)
        if config.finer_than_release():
            blocks = jnp.stack(jnp.broadcast_arrays(jnp.asarray(first, completed.dtype), completed), axis=-1)
            return score_sub_blocks(
                queries,
                keys,
                seen=blocks * config.keys_per_block,
                queries_per_row=1,
                keys_per_block=config.keys_per_block,
                join=config.join,
                heads=config.heads if config.has_head_queries else "each",
                first_row=first_row,
            )
        if first_row is not None:
            keys = jax.lax.dynamic_slice_in_dim(keys.swapaxes(1, 2), first_row, len(queries)).swapaxes(1, 2)
        logits, block = score_blocks(queries, keys.astype(jnp.float32)), jnp.arange(keys.shape[1])[None, None, None]
        visible = block < completed[:, None, :, None]
        if not isinstance(first, int) or first:
            visible &= block >= jnp.asarray(first)[..., None, :, None]
        return jnp.where(visible, logits, -jnp.inf)

    def _finish(self, x: jax.Array, norm: GateParam | None, positions: jax.Array) -> jax.Array:
        if norm is not None:
            x = rms_norm(x, norm[...], NORM_EPS)
        return apply_rope(x, positions, self.model.rope) if self.config.use_rope else x

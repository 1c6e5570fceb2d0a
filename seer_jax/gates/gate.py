"""The two gates: small learned predictors of which key blocks matter.

Both are stacked over layers: each weight has a leading axis L, and the model scans it together with its own layers. Their
arithmetic is float32 at full precision, whatever the dtype of the base model; on GPUs the products of their gradients are TF32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import pool_blocks, score_blocks
from pallas_kernels.precision import precise_einsum
from seer_jax.gates.configs import DecodeGateConfig, GateConfig, Pool, PrefillGateConfig, QueryReduction
from seer_jax.models.config import ModelConfig
from seer_jax.models.layers import GateParam, rms_norm
from seer_jax.models.rope import apply_rope

NORM_EPS = 1e-6
FEW_VECTORS = 16  # more would read the weights too often


def _initial_projection(key: jax.Array, shape: tuple[int, ...], kinds: tuple[Pool, ...], head_dim: int) -> jax.Array:
    """Starts a projection `[..., P, C]` as the identity on the average pool where the shapes allow it.

    The untrained gate then scores blocks by their mean query against their mean key, which is already a fair guess; random
    projections would have to find it first. Where C differs from D, random matrices that preserve lengths on average.
    """
    rows, dim = shape[-2:]
    noise = jax.random.normal(key, shape, jnp.float32)
    if dim != head_dim or Pool.AVG not in kinds:
        return noise * rows**-0.5
    start = kinds.index(Pool.AVG) * head_dim
    identity = jnp.zeros((rows, dim)).at[start : start + dim].set(jnp.eye(dim))
    return jnp.broadcast_to(identity, shape) + 0.02 * rows**-0.5 * noise


def _project(x: Float[Array, "B n K P"], weight: Float[Array, "K P C"]) -> Float[Array, "B n K C"]:
    """A projection of each key/value head."""
    return precise_einsum("bnkp,kpc->bnkc", x, weight)


def _project_queries(x: Float[Array, "B n K P"], weight: Float[Array, "K P C"]) -> Float[Array, "B n K C"]:
    """As `_project`. Of few vectors, as while tokens are decoded, it is a sum of products: XLA fuses that with what stands around
    it, while a matrix product needs copies of its operands in every layer. (On GPUs XLA keeps one transposed copy of the stacked
    weights for it.)
    """
    if x.shape[0] * x.shape[1] > FEW_VECTORS:
        return _project(x, weight)
    return (x[..., None] * weight[None, None]).sum(-2)


class PrefillGate(nnx.Module):
    """score[h, i, j] = rope(Pq(q)_i Wq) . rope(Pk(k)_j Wk) / sqrt(C) for j <= i (SeerAttention, arXiv 2410.13276, sec. 3.1).

    Attributes:
      linear_q: `[L, H, |Pq| D, C]`, or None in the one-linear form.
      linear_k: `[L, K, |Pk| D, C]`, in the one-linear form `[L, H, |Pk| D, C]`.
    """

    def __init__(self, config: PrefillGateConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.model = config, model
        one, dim, gate_dim = config.one_linear(model.head_dim), model.head_dim, config.gate_dim
        layers, heads, kv_heads = model.num_layers, model.num_heads, model.num_kv_heads
        q_shape = (layers, heads, len(config.q_pooling) * dim, gate_dim)
        k_shape = (layers, heads if one else kv_heads, len(config.k_pooling) * dim, gate_dim)
        make = functools.partial(_initial_projection, head_dim=dim)
        self.linear_q = None if one else GateParam(make(rngs.params(), q_shape, config.q_pooling))
        self.linear_k = GateParam(make(rngs.params(), k_shape, config.k_pooling))

    def __call__(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        positions: Int[Array, "#B T"],
        valid: Bool[Array, "#B T"] | None = None,
    ) -> Float[Array, "B H Tb Tb"]:
        """Logits of one layer (weights without their L axis), -inf above the diagonal; arguments as in `scores`."""
        logits = self.scores(q, k, positions, valid)
        causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        return jnp.where(causal[None, None], logits, -jnp.inf)

    def scores(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T K D"],
        positions: Int[Array, "#B T"],
        valid: Bool[Array, "#B T"] | None = None,
    ) -> Float[Array, "B H Tb Tb"]:
        """Logits of one layer, above the diagonal too, where they mean nothing: to leave them costs less than to blank them.

        Args:
          q, k: before RoPE (after q/k norm where the family has them).
          positions: of the tokens.
          valid: tokens that count, see `pool_blocks`.
        """
        config, group = self.config, self.model.group_size
        pooled_q = pool_blocks(q, config.q_pooling, block_size=config.block_size, valid=valid)
        pooled_k = pool_blocks(k, config.k_pooling, block_size=config.block_size, valid=valid)
        first = positions[:, :: config.block_size]
        if self.linear_q is not None:
            pooled_q = precise_einsum("bnhp,hpc->bnhc", pooled_q, self.linear_q[...])
            keys = _project(pooled_k, self.linear_k[...])
        else:
            weight = self.linear_k[...].reshape(-1, group, *self.linear_k.shape[1:]).swapaxes(1, 2)
            weight = weight.reshape(*weight.shape[:2], -1)  # [K, P, G C]
            # Without a barrier XLA would keep a second, transposed copy of the weights of all layers.
            weight = jax.lax.optimization_barrier(weight)
            keys = precise_einsum("bnkp,kpc->bnkc", pooled_k, weight).reshape(*pooled_q.shape)
        queries = apply_rope(pooled_q, first, self.model.rope)
        keys = apply_rope(keys, first, self.model.rope)
        return score_blocks(queries, keys, causal=True)


class DecodeGate(nnx.Module):
    """score[k, t, j] = rope(norm(Wq q_t)) . rope(norm(Wk Pk(k)_j)) / sqrt(C) for j < floor(t / b) (SeerAttention-R, arXiv
    2506.08889, sec. 3).

    Attributes:
      linear_q: `[L, K, G, D, C]` (PROJ), `[L, K, D, C]` (AVG_PROJ) or None (AVG).
      linear_k: `[L, K, |Pk| D, C]`.
      q_norm, k_norm: `[L, C]` or None.
    """

    def __init__(self, config: DecodeGateConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.model = config, model
        layers, kv_heads, group = model.num_layers, model.num_kv_heads, model.group_size
        dim, gate_dim = model.head_dim, config.gate_dim
        if config.query_reduction is QueryReduction.AVG and gate_dim != dim:
            raise ValueError(
                f"A gate that averages queries without projecting them needs gate_dim == head_dim; got {gate_dim} and {dim}."
            )
        if config.start_layer >= layers:
            raise ValueError(f"start_layer must leave a sparse layer: below {layers}; got {config.start_layer}.")
        make = functools.partial(_initial_projection, head_dim=dim)
        shapes = {
            QueryReduction.PROJ: (layers, kv_heads, group, dim, gate_dim),
            QueryReduction.AVG_PROJ: (layers, kv_heads, dim, gate_dim),
        }
        q_shape = shapes.get(config.query_reduction)
        scale = 1 / group if config.query_reduction is QueryReduction.PROJ else 1
        self.linear_q = None if q_shape is None else GateParam(make(rngs.params(), q_shape, (Pool.AVG,)) * scale)
        self.linear_k = GateParam(
            make(rngs.params(), (layers, kv_heads, len(config.k_pooling) * dim, gate_dim), config.k_pooling)
        )
        self.q_norm = GateParam(jnp.ones((layers, gate_dim))) if config.use_qk_norm else None
        self.k_norm = GateParam(jnp.ones((layers, gate_dim))) if config.use_qk_norm else None

    def queries(self, q: Float[Array, "B T H D"], positions: Int[Array, "#B T"]) -> Float[Array, "B T K C"]:
        """The gate's queries of one layer, one per key/value head; q before RoPE."""
        grouped = q.astype(jnp.float32).reshape(*q.shape[:2], self.model.num_kv_heads, -1, q.shape[-1])
        if self.linear_q is None:
            out = grouped.mean(3)
        elif self.config.query_reduction is QueryReduction.PROJ:
            weight = self.linear_q[...]
            flat = grouped.reshape(*grouped.shape[:3], -1)
            out = _project_queries(flat, weight.reshape(len(weight), -1, weight.shape[-1]))
        else:
            out = _project_queries(grouped.mean(3), self.linear_q[...])
        return self._finish(out, self.q_norm, positions)

    def keys(self, pooled: Float[Array, "B Sb K P"], first_positions: Int[Array, "#B Sb"]) -> Float[Array, "B Sb K C"]:
        """Compressed keys of one layer from pooled keys (`pool_blocks`); positions are those of each block's first token."""
        return self._finish(_project(pooled, self.linear_k[...]), self.k_norm, first_positions)

    def _finish(self, x: jax.Array, norm: GateParam | None, positions: jax.Array) -> jax.Array:
        if norm is not None:
            x = rms_norm(x, norm[...], NORM_EPS)
        return apply_rope(x, positions, self.model.rope) if self.config.use_rope else x

    def logits(
        self, queries: Float[Array, "B T K C"], keys: Float[Array, "B Sb K C"], completed: Int[Array, "B T"]
    ) -> Float[Array, "B K T Sb"]:
        """Logits of one layer, -inf from block `completed` on.

        Args:
          completed: number of completed earlier blocks of each query token, floor(t / b).
        """
        logits = score_blocks(queries, keys.astype(jnp.float32))
        visible = jnp.arange(keys.shape[1])[None, None, None] < completed[:, None, :, None]
        return jnp.where(visible, logits, -jnp.inf)


def make_gate(config: GateConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> PrefillGate | DecodeGate:
    """A fresh, untrained gate of the kind that the configuration describes."""
    if isinstance(config, PrefillGateConfig):
        return PrefillGate(config, model, rngs=rngs)
    return DecodeGate(config, model, rngs=rngs)

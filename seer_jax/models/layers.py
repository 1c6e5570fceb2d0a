"""Building blocks of the decoder. Weights keep names and layout of the Hugging Face checkpoint, stacked over layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import stacked_linear
from seer_jax.draws import standard_normal
from seer_jax.models.config import ModelConfig

TOKENS_AT_ONCE = 8192  # fill the matrix units of a large GPU; more only take memory
TOKENS_PER_TILE = 128


class BaseParam(nnx.Param):
    """A weight of the base model: frozen while gates are distilled."""


class GateParam(nnx.Param):
    """A weight of a gate: float32, trained by distillation."""


class LoraParam(nnx.Param):
    """A weight of a LoRA adapter: float32, trained in place of the base weights."""


@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """One layer's part of a weight that is stacked over layers, read where it lies: stands for the array in a `layer_view`.

    Attributes:
      stacked: `[L, ...]`.
      index: of the layer.
    """

    stacked: Array
    index: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's part."""
        return self.stacked.shape[1:]

    def __getitem__(self, key: Any) -> Array:
        """The layer's part as an array of its own."""
        return self.stacked[self.index][key]


def layer_view[M: nnx.Module](stack: M, index: Int[Array, ""]) -> M:
    """The module of one layer out of a module whose parameters are stacked over layers, without a copy of its weights.

    `parameter[...]` of the view is the layer's part. `Linear` and `apply_linears` read their weights where they lie in the stack.
    """
    return jax.tree.map(lambda x: LayerSlice(x, index), stack)


class Lora(nnx.Module):
    """scale * x A^T B^T, which a linear map with a frozen weight adds to its result (LoRA, arXiv 2106.09685).

    Attributes:
      a: `[r, in]`, float32.
      b: `[out, r]`, float32.
      scale: alpha / r.
    """

    def __init__(self, a: Float[Array, "*L r in"], b: Float[Array, "*L out r"], scale: float):
        self.a, self.b, self.scale = LoraParam(a), LoraParam(b), scale

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        a, b = (weight[...].astype(x.dtype) for weight in (self.a, self.b))
        return self.scale * jnp.einsum("...r,or->...o", jnp.einsum("...i,ri->...r", x, a), b)


class Linear(nnx.Module):
    """y = x W^T + b, with W `[out, in]` as in the checkpoint, and what an adapter adds.

    Attributes:
      lora: of the adapter that the model carries, see `lora.add_lora`; None: none.
    """

    lora: Lora | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        init = standard_normal(rngs.params(), (out_features, in_features)) * in_features**-0.5
        self.weight = BaseParam(init.astype(dtype))
        self.bias = BaseParam(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return apply_linears(x, self)[0]

    def completed(self, x: Float[Array, "*b in"], product: Float[Array, "*b out"]) -> Float[Array, "*b out"]:
        """The result, from the product of x and the weight."""
        y = product if self.lora is None else product + self.lora(x)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


def apply_linears(x: Float[Array, "*b in"], *linears: Linear) -> list[Float[Array, "*b _"]]:
    """Several linear maps of the same vectors; those of a `layer_view` in one kernel, see `stacked_linear`."""
    weights = [linear.weight.get_value() for linear in linears]
    if isinstance(weights[0], LayerSlice):
        products = stacked_linear(x.reshape(-1, x.shape[-1]), [w.stacked for w in weights], weights[0].index)
        products = [y.reshape(*x.shape[:-1], -1) for y in products]
    else:
        products = [jnp.einsum("...i,oi->...o", x, weight) for weight in weights]
    return [linear.completed(x, y) for linear, y in zip(linears, products, strict=True)]


def rms_norm(x: Float[Array, "*b dim"], weight: Float[Array, "dim"], eps: float) -> Float[Array, "*b dim"]:
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.broadcast_to(weight.astype(x.dtype), x.shape)


def update_tokens(
    function: Callable[..., Float[Array, "B n E"]], x: Float[Array, "B T E"], *others: Float[Array, "B T ..."]
) -> Float[Array, "B T E"]:
    """function(x, *others) of a function that takes each token by itself, a chunk of tokens at a time where there are many.

    What the function makes on its way exists for one chunk alone, and the results are written over `x`.
    """
    batch, tokens = x.shape[:2]
    most = max(TOKENS_AT_ONCE // batch // TOKENS_PER_TILE, 1) * TOKENS_PER_TILE
    if tokens <= most:
        return function(x, *others)
    even = -(-tokens // -(-tokens // most))  # chunks as equal as whole tiles allow
    size = -(-even // TOKENS_PER_TILE) * TOKENS_PER_TILE

    def chunk(i: Int[Array, ""], x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        start = jnp.minimum(i * size, tokens - size)
        before, *rest = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (x, *others))
        after = function(before, *rest)
        if tokens % size:  # the last chunk reaches back over tokens that are done
            done = start + jnp.arange(size) < i * size
            after = jnp.where(done[None, :, None], before, after)
        return jax.lax.dynamic_update_slice_in_dim(x, after, start, axis=1)

    return jax.lax.fori_loop(0, -(-tokens // size), chunk, x)


class Projections(nnx.Module):
    """The four projections around attention, and Qwen3's norms of queries and keys."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, dim = config.hidden_size, config.head_dim
        kinds: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.q_proj = Linear(width, config.num_heads * dim, bias=config.qkv_bias, **kinds)
        self.k_proj = Linear(width, config.num_kv_heads * dim, bias=config.qkv_bias, **kinds)
        self.v_proj = Linear(width, config.num_kv_heads * dim, bias=config.qkv_bias, **kinds)
        self.o_proj = Linear(config.num_heads * dim, width, bias=config.o_bias, **kinds)
        self.q_norm = BaseParam(jnp.ones(dim, dtype)) if config.qk_norm else None
        self.k_norm = BaseParam(jnp.ones(dim, dtype)) if config.qk_norm else None
        self.config = config

    def qkv(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values **before RoPE**, normed where the family norms them: what the gates read."""
        dim, eps = self.config.head_dim, self.config.rms_norm_eps
        projected = apply_linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.reshape(*x.shape[:2], -1, dim) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)
        return q, k, v

    def out(self, attended: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Projection of the attention's output."""
        return self.o_proj(attended.reshape(*attended.shape[:2], -1))


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)).

    The feed-forward part of the dense families. Another family names a module of its own: constructed as this one, and called with the
    normed hidden states, it returns what is added to them.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **kinds)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        gate, up = apply_linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up)

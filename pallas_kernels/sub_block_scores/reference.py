"""The definition of `score_sub_blocks` in plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.online_softmax import finite, log_sum_exp


def score_sub_blocks(
    queries: Float32[Array, "B Tu H C"],
    keys: Float[Array, "P Sw K C"],
    *,
    seen: Int32[Array, "#B Tu 2"],
    queries_per_row: int,
    keys_per_block: int,
    join: str,
    heads: str,
    scale: float,
    first_row: Int32[Array, ""] | None,
) -> Float32[Array, "B lists rows Sb"]:
    """See the function of this name in api.py."""
    if first_row is not None:
        keys = jax.lax.dynamic_slice_in_dim(keys, first_row, len(queries))
    group = queries.shape[2] // keys.shape[2]
    keys = jnp.repeat(keys.astype(jnp.float32), group, axis=2)
    number = jnp.arange(keys.shape[1])[None, None]
    sees = (number >= seen[..., :1]) & (number < seen[..., 1:])
    logits = scale * jnp.einsum("buhc,bwhc->bhuw", queries, keys, precision="highest")
    logits = jnp.where(sees[:, None], logits, -jnp.inf)
    lse = log_sum_exp(logits, axis=-1)

    def split(x: Array, axis: int, size: int) -> Array:
        """Splits an axis in parts of that size, the last one filled up with -inf."""
        pad = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
        x = jnp.pad(x, pad, constant_values=-jnp.inf)
        return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])

    of_blocks = split(logits - finite(lse)[..., None], 3, keys_per_block)
    shares = log_sum_exp(of_blocks, axis=-1) if join == "sum" else of_blocks.max(-1)
    if heads != "each":
        of_heads = split(shares, 1, group)
        shares = of_heads.max(2) if heads == "max" else log_sum_exp(of_heads - jnp.log(group), axis=2)
    return split(shares, 2, queries_per_row).max(3)

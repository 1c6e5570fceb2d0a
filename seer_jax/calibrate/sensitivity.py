"""How the loss of a text depends on the output of each attention head: one backward pass of dense attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seer_jax.models.decoder import LayerContext, Transformer
from seer_jax.models.dense_attention import dense_attention
from seer_jax.models.rope import rotate

HEAD_CHUNK = 512  # tokens whose logits exist at once


@jax.jit
def output_gradients(model: Transformer, tokens: Int[Array, "1 T"]) -> Float[Array, "L T H D"]:
    """d(sum over t of -log p(token t | the tokens before)) / d(output of head h at token s), with dense attention.

    Args:
      tokens: a window of text, no padding.

    Returns:
      In the model's dtype.
    """
    config = model.config
    positions = jnp.arange(tokens.shape[1])[None]

    def attend(layer: LayerContext, shifts: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        out = dense_attention(*rotate(q, k, positions, config.rope), v)
        return out + shifts[layer.index][None], shifts, None

    def loss(shifts: jax.Array) -> jax.Array:
        hidden, _, _ = model.scan(tokens, attend, shifts, remat=True)
        return _total_loss(model, hidden[0, :-1], tokens[0, 1:])

    shape = config.num_layers, tokens.shape[1], config.num_heads, config.head_dim
    return jax.grad(loss)(jnp.zeros(shape, model.dtype))


def _total_loss(model: Transformer, hidden: Float[Array, "n E"], targets: Int[Array, "n"]) -> Float[Array, ""]:
    """Sum of -log p(target); logits exist for a chunk of tokens at a time."""
    count, size = len(targets), min(HEAD_CHUNK, len(targets))
    pad = -count % size
    parts = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
    wanted = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, size)

    @jax.checkpoint
    def chunk(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        log_p = jax.nn.log_softmax(model.logits(x[0]), axis=-1)
        nll = -jnp.take_along_axis(log_p, jnp.maximum(x[1], 0)[:, None], axis=-1)[:, 0]
        return jnp.where(x[1] >= 0, nll, 0).sum()

    return jax.lax.map(chunk, (parts, wanted)).sum()

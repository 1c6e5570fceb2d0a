"""How the loss of a text depends on the output of each attention head: one backward pass of dense attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.models.dense_attention import dense_attention
from seer_jax.models.rope import rotate
from seer_jax.sharding.on_mesh import OF_ROWS, Split
from seer_jax.sharding.table import ROWS, TENSOR
from seer_jax.sharding.vocabulary import score_targets

HEAD_CHUNK = 512  # tokens whose logits exist at once
OF_QUERY_HEADS = P(ROWS, None, None, TENSOR)  # [B, L, T, H, D]


@jax.jit
def output_gradients(model: Transformer, tokens: Int[Array, "B T"]) -> Float[Array, "B L T H D"]:
    """d(sum over t of -log p(token t | the tokens before)) / d(output of head h at token s), with dense attention, for each row.

    Args:
      tokens: windows of text, no padding.

    Returns:
      In the model's dtype, on a mesh with the rows and heads where those of the model are.
    """
    config, segments = model.config, [Segment(model.config.num_layers)]

    def loss(shifts: jax.Array) -> jax.Array:
        return model.spread(_losses, (OF_ROWS,), segments, tokens, Split(shifts, OF_QUERY_HEADS))[0].sum()

    shape = len(tokens), config.num_layers, tokens.shape[1], config.num_heads, config.head_dim
    return jax.grad(loss)(jnp.zeros(shape, model.dtype))


def _losses(
    model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"], shifts: Float[Array, "B L T H D"]
) -> tuple[Float32[Array, "B"]]:
    """Loss of each row where the outputs of heads are shifted."""
    positions = jnp.arange(tokens.shape[1])[None]

    def attend(layer: LayerContext, shifts: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        out = dense_attention(*rotate(q, k, positions, model.config.rope), v)
        return out + shifts[:, layer.index], shifts, None

    hidden, _, _ = model.scan(tokens, attend, shifts, segments=segments, remat=True)
    return (jax.lax.map(lambda x: _total_loss(model, x[0][:-1], x[1][1:]), (hidden, tokens)),)


def _total_loss(model: Transformer, hidden: Float[Array, "n E"], targets: Int[Array, "n"]) -> Float[Array, ""]:
    """Sum of -log p(target); logits exist for a chunk of tokens at a time."""
    count, size = len(targets), min(HEAD_CHUNK, len(targets))
    pad = -count % size
    parts = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
    wanted = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, size)

    @jax.checkpoint
    def chunk(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        nll, _ = score_targets(model.logits(x[0]), jnp.maximum(x[1], 0), model.shard)
        return jnp.where(x[1] >= 0, nll, 0).sum()

    return jax.lax.map(chunk, (parts, wanted)).sum()

"""One dense pass over a window: what rules keep and lose at each of their levels, and what a policy keeps, in every layer and list."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.devices import default_device
from pallas_kernels.online_softmax import dot
from seer_jax.calibrate.levels import GRIDS, Curves, Rows, Tokens, drop_curves
from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.window import Token, token_contexts
from seer_jax.models.attention import ROWS_AT_ONCE
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.models.decoder.stack import LayerContext, Segment
from seer_jax.models.dense_attention import dense_attention
from seer_jax.selection.context import Context, PrefillContext
from seer_jax.selection.policies import Policy
from seer_jax.selection.scorers import Scorer
from seer_jax.sharding.on_mesh import OF_ROWS, Split
from seer_jax.sharding.table import KV, ROWS, TENSOR

# Of the attention map that exist at once; why GPUs take more: `evaluate.window.AtOnce`.
ELEMENTS, ELEMENTS_ON_GPUS = 2**25, 2**27
MAX_BLOCKS = ROWS_AT_ONCE  # of a window: scores of longer prompts are made in several parts

# Of some consecutive tokens, from the first one on: arrays [X, rows, Sb].
_Read = Callable[[Int[Array, ""], int], Any]
_Choose = Callable[[Context, Policy], Any]  # arrays [1, X, rows, Sb] of a prompt, [1, X, Sb] of a token


@functools.partial(jax.jit, static_argnames=("phase", "rules"))
def collect_curves(
    model: Transformer,
    tokens: Int[Array, "B T"],
    gradients: Float[Array, "B L T H D"],
    scorer: Scorer,
    *,
    phase: Phase,
    rules: tuple[str, ...] = tuple(GRIDS),
) -> dict[str, Curves]:
    """Curves of each rule, `[B, L, heads, N]`, where every row of a window is sparse and its layers' inputs are those of dense attention.

    Args:
      tokens: windows whose length is a multiple of the block size, at most `MAX_BLOCKS` blocks.
      gradients: see `output_gradients`.
      scorer: what ranks the blocks.
      phase: heads are H lists of each block row at prefill, K lists of each token while decoding.
      rules: names in `GRIDS`.
    """
    heads = TENSOR if phase is Phase.PREFILL else KV
    arguments = tokens, Split(gradients, P(ROWS, None, None, heads)), Split(scorer, P())
    collect = functools.partial(_collect, phase, rules)
    (curves,) = model.spread(collect, (P(ROWS, None, heads),), [Segment(model.config.num_layers)], *arguments)
    return model.everywhere(curves)


def _collect(
    phase: Phase,
    rules: tuple[str, ...],
    model: Transformer,
    segments: Sequence[Segment],
    tokens: Int[Array, "B T"],
    gradients: Float[Array, "B L T H D"],
    scorer: Scorer,
) -> tuple[dict[str, Curves]]:
    """See `collect_curves`. While decoding, the gradients are those of whole groups of heads."""
    heads = _num_lists(model, phase)

    def look(context: Context, policy: Policy) -> tuple[jax.Array, jax.Array]:
        """Scores, and the blocks that are kept whatever they are."""
        del policy
        if isinstance(context, PrefillContext):
            context = dataclasses.replace(context, prepared=scorer.prepare(context))
            scores = scorer.prefill_scores(context)
            scores = jnp.repeat(scores, heads // scores.shape[1], axis=1)
        else:
            scores = scorer.decode_scores(context)
        keep, always = context.keep(0), scorer.keep(context)
        return scores, jnp.broadcast_to(keep if always is None else keep | always, scores.shape)

    def attend(layer: LayerContext, state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        part = _Layer.of(model, layer, q, k, v, phase)
        return part.attended, state, part.curves(part.reader(look), state[layer.index], rules)

    def read(row: tuple[jax.Array, jax.Array]) -> Any:
        return model.scan(row[0][None], attend, row[1], segments=segments)[2]

    return (jax.lax.map(read, (tokens, gradients)),)


@functools.partial(jax.jit, static_argnames="phase")
def kept_mass(model: Transformer, tokens: Int[Array, "B T"], policy: Policy, *, phase: Phase) -> Float32[Array, "B L"]:
    """Share of the true attention mass that lies in the blocks that a policy keeps, mean over tokens and heads, in each row and layer.

    The layers' inputs are those of dense attention.
    """
    gate = model.prefill_gate if phase is Phase.PREFILL else model.decode_gate
    segments = model.segments(policy, gate, _num_lists(model, phase), phase)
    return model.everywhere(model.spread(functools.partial(_kept_mass, phase), (OF_ROWS,), segments, tokens)[0])


def _kept_mass(
    phase: Phase, model: Transformer, segments: Sequence[Segment], tokens: Int[Array, "B T"]
) -> tuple[Float32[Array, "B L"]]:
    def masks(context: Context, policy: Policy) -> jax.Array:
        context = policy.prepare(context) if isinstance(context, PrefillContext) else context
        blocks = policy.blocks(context)
        assert blocks is not None  # as no policy but Dense keeps every block, and that is not asked
        return blocks.to_mask(context.num_key_blocks)

    def attend(layer: LayerContext, state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        part = _Layer.of(model, layer, q, k, v, phase)
        kept = jnp.float32(1) if layer.policy.is_dense else part.kept_mass(part.reader(masks))
        return part.attended, state, kept

    kept = jax.lax.map(lambda row: model.scan(row[None], attend, segments=segments)[2], tokens)
    return (kept if model.shard is None else model.shard.mean_over_tensor(kept),)


def _num_lists(model: Transformer, phase: Phase) -> int:
    return model.config.num_heads if phase is Phase.PREFILL else model.config.num_kv_heads


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Attention of one layer of a window.

    Attributes:
      q, k, v: after RoPE; while decoding with all query heads of a group, though devices may share them.
      out: dense attention of these heads.
      attended: of the heads that the device has.
      block_size: b.
      row: tokens that share a list: b at prefill, 1 while decoding.
      reader: of what a function of the contexts chooses.
    """

    q: Float[Array, "T H D"]
    k: Float[Array, "T K D"]
    v: Float[Array, "T K D"]
    out: Float[Array, "T H D"]
    attended: Float[Array, "1 T h D"]
    block_size: int
    row: int
    reader: Callable[[_Choose], _Read]

    @classmethod
    def of(cls, model: Transformer, layer: LayerContext, q: Array, k: Array, v: Array, phase: Phase) -> "_Layer":
        """Of one layer of `Transformer.scan`; q and k before RoPE."""
        shard = model.shard if phase is Phase.DECODE else None
        q = q if shard is None else shard.group(q)
        context = model.prefill_context(layer, q, k, v, jnp.full(1, q.shape[1], jnp.int32))
        out = dense_attention(context.q_rotated, context.k_rotated, context.v)
        if phase is Phase.PREFILL:
            b = context.block_size
            reader = functools.partial(_prefill_reader, context, layer.policy)
        else:
            b = layer.policy.tokens_per_block(layer.decode_gate)
            reader = functools.partial(_decode_reader, model, layer, context)
        own = out if shard is None else shard.own_heads(out)
        row = b if phase is Phase.PREFILL else 1
        return cls(context.q_rotated[0], context.k_rotated[0], context.v[0], out[0], own, b, row, reader)

    @property
    def num_blocks(self) -> int:
        """Sb."""
        return len(self.k) // self.block_size

    def curves(self, look: _Read, gradient: Float[Array, "T H D"], rules: tuple[str, ...]) -> dict[str, Curves]:
        """Of each rule."""
        size_of_values = jnp.sqrt(jnp.square(self.v.astype(jnp.float32)).mean((0, 2)))

        def chunk(first: Int[Array, ""], size: int) -> dict[str, Curves]:
            mass, effect = self._effects(first, size, gradient)
            rows = self._rows(first, size, *look(first, size))
            lists, count = rows.scores.shape[:2]

            def by_list(x: jax.Array) -> jax.Array:
                return jnp.moveaxis(x.reshape(lists, -1, count, self.row, *x.shape[2:]), 1, 3)

            scale = jnp.linalg.norm(jax.lax.dynamic_slice_in_dim(gradient, first, size).astype(jnp.float32), axis=-1)
            scale = (scale * jnp.repeat(size_of_values, scale.shape[1] // len(size_of_values))[None]).T
            tokens = Tokens(by_list(mass), by_list(effect), by_list(scale))
            return {rule: drop_curves(rows, tokens, GRIDS[rule]) for rule in rules}

        visible = self.block_size // self.row * self.num_blocks * (self.num_blocks + 1) / 2
        return {rule: found.normalised(visible, len(self.q)) for rule, found in self._sum(chunk).items()}

    def kept_mass(self, masks: _Read) -> Float32[Array, ""]:
        """Mean over tokens and heads."""

        def chunk(first: Int[Array, ""], size: int) -> Array:
            mass, _ = self._effects(first, size, None)
            mask = masks(first, size)  # [X, R, Sb]
            mass = mass.reshape(mask.shape[0], -1, mask.shape[1], self.row, self.num_blocks)
            return jnp.einsum("xgrnj,xrj->", mass, mask.astype(jnp.float32))

        return self._sum(chunk) / (self.q.shape[0] * self.q.shape[1])

    def _sum(self, function: Callable[[Int[Array, ""], int], Any]) -> Any:
        """Of a function of consecutive tokens."""
        elements = self.q.shape[1] * self.block_size * len(self.k)
        most = ELEMENTS if default_device().platform == "cpu" else ELEMENTS_ON_GPUS
        size = self.block_size * _divisor(self.num_blocks, max(1, most // elements))
        parts = jax.lax.map(lambda first: function(first, size), jnp.arange(0, len(self.q), size))
        return jax.tree.map(lambda x: x.sum(0), parts)

    def _rows(
        self, first: Int[Array, ""], size: int, scores: Float32[Array, "X R Sb"], keep: Bool[Array, "X R Sb"]
    ) -> Rows:
        current = ((first + jnp.arange(0, size, self.row)) // self.block_size)[None, :, None]
        column = jnp.arange(self.num_blocks)[None, None]
        visible = column <= current
        return Rows(scores, visible, visible if self.row > 1 else column < current, keep)

    def _effects(
        self, first: Int[Array, ""], size: int, gradient: Float[Array, "T H D"] | None
    ) -> tuple[Float32[Array, "H n Sb"], Float32[Array, "H n Sb"]]:
        """Mass of each key block in the attention of each token, and the sum over the block's keys s of A_s g . (v_s - out).

        Without the blocks D, whose mass is m, the output changes by -(sum over s in D of A_s (v_s - out)) / (1 - m), and the loss, to
        first order, by g times it.
        """
        (_, heads, dim), (keys, kv_heads, _) = self.q.shape, self.k.shape

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first, size).reshape(size, kv_heads, -1, dim)

        def by_block(x: jax.Array) -> jax.Array:
            return x.reshape(heads, size, -1, self.block_size).sum(-1)

        logits = dot("nkgd,skd->kgns", cut(self.q), self.k) * dim**-0.5
        causal = jnp.arange(keys)[None] <= first + jnp.arange(size)[:, None]
        weights = jax.nn.softmax(jnp.where(causal[None, None], logits, -jnp.inf), axis=-1)
        mass = by_block(weights)
        if gradient is None:
            return mass, mass
        change = dot("nkgd,skd->kgns", cut(gradient), self.v)
        mean = jnp.einsum("nkgd,nkgd->kgn", cut(gradient), cut(self.out), preferred_element_type=jnp.float32)
        return mass, by_block(weights * (change - mean[..., None]))


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= most)


def _prefill_reader(context: PrefillContext, policy: Policy, choose: _Choose) -> _Read:
    lists, b = choose(context, policy), context.block_size

    def read(first: Int[Array, ""], size: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x[0], first // b, size // b, axis=1), lists)

    return read


def _decode_reader(model: Transformer, layer: LayerContext, context: PrefillContext, choose: _Choose) -> _Read:
    gate = None if layer.decode_gate is None else layer.decode_gate.config
    tokens = context.q.shape[1]
    cache = Cache.create(dataclasses.replace(model.config, num_layers=1), 1, tokens, model.dtype, decode_gate=gate)
    assert context.k is not None
    _, context_of = token_contexts(layer, cache, context.k, context.k_rotated, context.v, model.shard)
    every = Token(context.q[0], context.q_rotated[0], jnp.arange(tokens))

    def read(first: Int[Array, ""], size: int) -> Any:
        some = Token(*(jax.lax.dynamic_slice_in_dim(x, first, size) for x in every))
        chosen = jax.vmap(lambda token: choose(context_of(token), layer.policy))(some)
        return jax.tree.map(lambda x: jnp.swapaxes(x[:, 0], 0, 1), chosen)

    return read

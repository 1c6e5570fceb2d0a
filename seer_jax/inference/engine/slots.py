"""Slots: rows of one cache that begin and end by themselves, and the two kinds of programs that work on them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from seer_jax.inference.engine.row_sampling import RowSampling
from seer_jax.inference.request import NO_TOKEN
from seer_jax.models.cache import Cache
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Policy

KEY_KIND, KEY_WORDS = "threefry2x32", 2  # of JAX's usual keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What the requests of B rows ask for.

    Attributes:
      sampling: how tokens are drawn.
      keys: data of each row's PRNG key; token n takes `fold_in(key, n)`, as in `generate`.
      stop: tokens that end a row, filled up with `NO_TOKEN`.
      most: new tokens that end a row.
    """

    sampling: RowSampling
    keys: UInt32[Any, "B 2"]
    stop: Int[Any, "B E"]
    most: Int[Any, "B"]

    @classmethod
    def empty(cls, batch: int, stop: int, one: RowSampling) -> "RowSettings":
        """Settings of free rows."""
        sampling = jax.tree.map(lambda x: np.repeat(x, batch), one)
        keys, stops = np.zeros((batch, KEY_WORDS), np.uint32), np.full((batch, stop), NO_TOKEN, np.int32)
        return cls(sampling, keys, stops, np.ones(batch, np.int32))

    def ends(self, tokens: Int[Array, "B"], counts: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether rows end with a token, which is the last of so many."""
        return (tokens[:, None] == self.stop).any(-1) | (counts >= self.most)

    def draw(
        self, logits: Array, counts: Int[Array, "B"], active: Bool[Array, "B"]
    ) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
        """The next token of each row, and whether its logits are finite."""
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(self.keys, impl=KEY_KIND), counts)
        return self.sampling.sample(logits, keys, active), jnp.isfinite(logits).all(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The rows of a cache and where each stands.

    Attributes:
      cache: its lengths are 0 in rows that are not active, so that a step spends next to nothing on them.
      settings: of the requests.
      last: newest token of each row.
      counts: new tokens of each row.
      active: rows that go on.
    """

    cache: Cache
    settings: RowSettings
    last: Int[Any, "B"]
    counts: Int[Any, "B"]
    active: Bool[Any, "B"]

    @classmethod
    def of(cls, cache: Cache, settings: RowSettings) -> "Slots":
        """Free slots."""
        batch = len(settings.most)
        last, counts = (np.zeros(batch, np.int32) for _ in range(2))
        return cls(cache, settings, last, counts, np.zeros(batch, bool))

    def everywhere(self, model: Transformer) -> "Slots":
        """The slots, with lengths and all arrays outside of the cache on every device of the model's mesh."""
        lengths, settings, *rest = model.everywhere(
            (self.cache.lengths, self.settings, self.last, self.counts, self.active)
        )
        return Slots(self.cache.with_lengths(lengths), settings, *rest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a prompt.

    Attributes:
      tokens: padded.
      length: of the whole prompt.
      row: slot that it goes to.
      start: position of the piece.
      settings: of the request.
    """

    tokens: Int[Any, "1 T"]
    length: Int[Any, "1"]
    row: Int[Any, ""]
    start: Int[Any, ""]
    settings: RowSettings


@functools.partial(jax.jit, donate_argnames="slots")
def read_piece(model: Transformer, policy: Policy, slots: Slots, piece: Piece) -> tuple[Slots, Int[Array, "1 3"]]:
    """Reads a piece of a prompt into its slot; the piece that ends the prompt draws the first token, and the row goes on from there.

    Returns:
      (slots; of the piece's row the new token or `NO_TOKEN`, whether the row is active, and whether its logits were not finite).
    """
    logits, cache = model.prefill_row(
        piece.tokens, piece.length, slots.cache, row=piece.row, start=piece.start, sparsity=policy
    )
    is_last = piece.start + piece.tokens.shape[1] >= piece.length
    token, finite = piece.settings.draw(logits, jnp.zeros(1, jnp.int32), is_last)
    made = is_last & finite
    active = made & ~piece.settings.ends(token, jnp.ones(1, jnp.int32))

    def put(rows: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, value.astype(rows.dtype), piece.row, axis=0)

    slots = Slots(
        cache=cache.with_lengths(put(cache.lengths, jnp.where(active, piece.length, 0))),
        settings=jax.tree.map(put, slots.settings, jax.tree.map(jnp.asarray, piece.settings)),
        last=put(slots.last, token),
        counts=put(slots.counts, jnp.ones(1, jnp.int32)),
        active=put(slots.active, active),
    )
    outcome = jnp.stack([jnp.where(made, token, NO_TOKEN), active, is_last & ~finite], axis=1)
    return slots.everywhere(model), model.everywhere(outcome.astype(jnp.int32))


@functools.partial(jax.jit, donate_argnames="slots", static_argnames="steps")
def decode_steps(
    model: Transformer, policy: Policy, slots: Slots, alive: Bool[Any, "B"], *, steps: int
) -> tuple[Slots, Int[Array, "B N"]]:
    """Makes up to `steps` tokens of each active row.

    Args:
      alive: rows that go on if they are active; the others are free from now on.

    Returns:
      (slots; of each row the new tokens, `NO_TOKEN` behind its end, whether it is active, and whether its logits were not finite).
    """
    batch = slots.last.shape[0]

    def step(carry: tuple) -> tuple:
        number, slots, tokens, failed = carry
        active, settings = slots.active, slots.settings
        logits, cache, _ = model.decode(slots.last, slots.cache, sparsity=policy, active=active)
        token, finite = settings.draw(logits, slots.counts, active)
        made = active & finite
        counts = slots.counts + made
        goes_on = made & ~settings.ends(token, counts)
        tokens = tokens.at[:, number].set(jnp.where(made, token, NO_TOKEN))
        cache = cache.with_lengths(jnp.where(goes_on, cache.lengths, 0))
        slots = Slots(cache, settings, jnp.where(made, token, slots.last), counts, goes_on)
        return number + 1, slots.everywhere(model), tokens, failed | (active & ~finite)

    active = slots.active & alive
    cache = slots.cache.with_lengths(jnp.where(active, slots.cache.lengths, 0))
    start = dataclasses.replace(slots, cache=cache, active=active).everywhere(model)
    tokens = model.everywhere((jnp.full((batch, steps), NO_TOKEN, jnp.int32), jnp.zeros(batch, bool)))
    carry = jax.lax.while_loop(lambda c: (c[0] < steps) & c[1].active.any(), step, (jnp.int32(0), start, *tokens))
    _, slots, tokens, failed = carry
    outcome = jnp.concatenate([tokens, slots.active[:, None], failed[:, None]], axis=1)
    return slots.everywhere(model), model.everywhere(outcome)

"""Requests to an engine: checked when they come, and as arrays for their slots."""

from typing import NamedTuple

import jax
import numpy as np

from seer_jax.inference.engine.completion import Completion
from seer_jax.inference.engine.row_sampling import RowSampling
from seer_jax.inference.engine.slots import KEY_KIND, KEY_WORDS, RowSettings
from seer_jax.inference.request import NO_TOKEN, Request
from seer_jax.inference.sampling import Greedy, row_keys
from seer_jax.models.decoder import Transformer

MOST_STOP_TOKENS = 32


class Seat(NamedTuple):
    """A request with what its slot needs."""

    completion: Completion
    settings: RowSettings


def check_room(request: Request, model: Transformer, length: int, capacity: int, most: int | None) -> None:
    """Raises ValueError where a prompt of `length` tokens and its new tokens are too many.

    Args:
      request: which says how many are new.
      model: whose context they must fit.
      length: of the prompt.
      capacity: of a slot.
      most: new tokens that a request may ask for; None: any number.
    """
    new = int(request.max_new_tokens)
    request.check_context(model, length)
    if most is not None and new > most:
        raise ValueError(f"max_new_tokens must be at most {most}, which is this engine's limit; got {new}.")
    if length + new - 1 > capacity:  # the last token is never fed
        raise ValueError(
            f"A slot must have room for prompt and new tokens, {length} + {new} - 1; got capacity {capacity}. Shorten the prompt, lower "
            "max_new_tokens, or make an engine with more."
        )


def row_settings(request: Request, model: Transformer) -> RowSettings:
    """What a request asks for, for its row.

    Raises:
      ValueError: it has too many stop tokens, a key of another kind than JAX's usual one, or a sampling method of the caller's own.
    """
    vocab_size, stop = model.config.vocab_size, request.end_tokens(model)
    if (given := int((stop != NO_TOKEN).sum())) > MOST_STOP_TOKENS:
        raise ValueError(
            f"A request may have at most {MOST_STOP_TOKENS} stop tokens (eos); got {given}. Pass fewer: eos=(...)."
        )
    keys = np.zeros((1, KEY_WORDS), np.uint32)
    if request.key is not None and not isinstance(request.sampling, Greedy):
        key = row_keys(request.key, 1)
        if (kind := str(jax.random.key_impl(key))) != KEY_KIND:
            raise ValueError(
                f"key must be of the kind {KEY_KIND}; got {kind}. Pass jax.random.key(seed, impl={KEY_KIND!r})."
            )
        keys = np.asarray(jax.random.key_data(key))
    stop = np.pad(stop, (0, MOST_STOP_TOKENS), constant_values=NO_TOKEN)[None, :MOST_STOP_TOKENS]
    most = np.asarray([request.max_new_tokens], np.int32)
    return RowSettings(RowSampling.of(request.sampling, vocab_size), keys, stop, most)

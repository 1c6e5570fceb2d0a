"""What a generation should do, besides reading its prompts."""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seer_jax.inference.sampling import Greedy, Keys, Sample, Sampling
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense, Policy

CACHE_MULTIPLE = 64  # tokens; caches of a model without a decode gate are rounded up to this


class RequestSettings(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `plan_memory`: the fields of `Request`."""

    max_new_tokens: int
    prefill: Policy | None
    decode: Policy | None
    sampling: Sampling
    key: Keys | None
    eos: int | Sequence[int] | None
    cache_capacity: int | None
    beyond_context: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How prompts are continued.

    Attributes:
      max_new_tokens: N >= 1.
      prefill: which blocks attention keeps while the prompts are read; None: what the model's prefill gate recommends, else `Dense()`.
      decode: which cached blocks each new token attends to; None: what the model's decode gate recommends, else `Dense()`.
      sampling: how tokens are drawn.
      key: a PRNG key, or one for each row, where `sampling` draws at random. A row's tokens depend on its own key and
        prompt, never on its neighbours; row i of a single key uses `fold_in(key, i)`.
      eos: tokens that end a row; None: `model.config.eos_token_ids`; (): none.
      cache_capacity: S, tokens that the cache has room for in each row; None: T + N - 1. Rounded up to whole blocks.
      beyond_context: allow more tokens than the model's `max_position_embeddings`.
    """

    max_new_tokens: int
    prefill: Policy | None = None
    decode: Policy | None = None
    sampling: Sampling = Greedy()
    key: Keys | None = None
    eos: int | Sequence[int] | None = None
    cache_capacity: int | None = None
    beyond_context: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}.")
        for name in ("prefill", "decode"):
            policy = getattr(self, name)
            if policy is not None and not isinstance(policy, Policy):
                raise ValueError(
                    f"{name} must be a sparsity policy such as Dense() or Threshold(5e-4), or None; got {policy!r}."
                )
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling must be Greedy() or Sample(temperature, ...); got {self.sampling!r}.")

    @classmethod
    def of(cls, model: Transformer, **settings: Unpack[RequestSettings]) -> "Request":
        """The request with the model's recommendations where no policy is named, checked against the model.

        Raises:
          ValueError: a setting is out of its domain, or a policy does not fit the model.
        """
        return cls(**settings).for_model(model)  # pyright: ignore[reportCallIssue]

    def for_model(self, model: Transformer) -> "Request":
        """See `of`."""
        prefill, decode = (
            policy or (None if gate is None else gate.recommended) or Dense()
            for policy, gate in ((self.prefill, model.prefill_gate), (self.decode, model.decode_gate))
        )
        model.segments(prefill, model.prefill_gate, model.config.num_heads)
        model.segments(decode, model.decode_gate, model.config.num_kv_heads)
        return dataclasses.replace(self, prefill=prefill, decode=decode)

    def check_key(self) -> None:
        """Raises ValueError where tokens are drawn at random and there is no key."""
        if isinstance(self.sampling, Sample) and self.key is None:
            raise ValueError(
                f"{self.sampling} draws at random, so a key must be given; got None. Pass key=jax.random.key(seed)."
            )

    def end_tokens(self, model: Transformer) -> Int[Array, "E"]:
        """Tokens that end a row.

        Raises:
          ValueError: one is not in the vocabulary.
        """
        eos, vocab_size = model.config.eos_token_ids if self.eos is None else self.eos, model.config.vocab_size
        ids = np.array(eos if isinstance(eos, Sequence) else [eos], np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"EOS tokens must lie in [0, {vocab_size}), the model's vocabulary; got {ids.tolist()}.")
        return jnp.asarray(ids, jnp.int32)

    def capacity(self, model: Transformer, width: int, longest: int) -> int:
        """S, rounded up to whole blocks.

        Args:
          model: whose decode gate sets the size of a block.
          width: T, tokens of the padded prompts.
          longest: tokens of the longest prompt.

        Raises:
          ValueError: the tokens exceed the model's context or `cache_capacity`.
        """
        context, new = model.config.max_position_embeddings, self.max_new_tokens
        if longest + new > context and not self.beyond_context:
            raise ValueError(
                f"Prompt and new tokens must fit the model's context, max_position_embeddings = {context} tokens; "
                f"got {longest} + {new}. Shorten the prompt or max_new_tokens, load the model with a RoPE scaling for longer "
                "contexts, or pass beyond_context=True."
            )
        needed = max(width, longest + new - 1)  # the last token is never fed
        if self.cache_capacity is not None and self.cache_capacity < needed:
            raise ValueError(
                f"The cache must hold the padded prompts and all new tokens but the last, {needed} tokens; got "
                f"cache_capacity={self.cache_capacity}. Raise it, leave it out, or lower max_new_tokens."
            )
        size = width + new - 1 if self.cache_capacity is None else self.cache_capacity
        multiple = CACHE_MULTIPLE if model.decode_gate is None else model.decode_gate.config.block_size
        return -(-size // multiple) * multiple

"""Several prompts, one after the other: what one shares with the one before it is not read again."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

from seer_jax.inference.conversation import Conversation
from seer_jax.inference.generate import Generated
from seer_jax.inference.prompts import check_prompt
from seer_jax.inference.request import Request, RequestSettings
from seer_jax.inference.sampling import Greedy, row_keys
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Policy


class Continued(NamedTuple):
    """What became of one prompt.

    Fields:
      result: as `generate` returns it for the prompt alone; `prefill_kept` is of the tokens that were read.
      read: tokens of the prompt that were read for it; the others had been read for earlier ones.
    """

    result: Generated
    read: int


def generate_each(
    model: Transformer, prompts: Sequence[Sequence[int]], **settings: Unpack[RequestSettings]
) -> Iterator[Continued]:
    """Continues prompts one after the other, where each reads only what it does not share with the one before it.

    Results are those of `generate` with each prompt alone, but for rounding: a block row is read again where its choice of blocks asks for the
    length of the prompt (`TopK` with another number of blocks, `dense_last_rows`). Prompts with much in common should stand together. One cache
    serves all.

    Args:
      model: see `generate`.
      prompts: token ids, at least one in each.
      **settings: as in `generate`; row i of a key is prompt i's. `cache_capacity` is the room for the longest prompt and its new tokens,
        `prefill_chunk` as in `Conversation`.

    Yields:
      What became of each prompt, when it is complete.

    Raises:
      ValueError: as `generate`, at once, or a policy looks at whole prompts or is of the caller's own masks.
      MemoryError: the device has no room for the cache.
    """
    request = Request.of(model, **settings)
    request.require_key()
    if not len(prompts):
        raise ValueError("Generation needs at least one prompt; got none.")
    vocab_size = model.config.vocab_size
    prompts = [check_prompt(row, f"Prompt {number}", vocab_size=vocab_size) for number, row in enumerate(prompts)]
    longest = max(map(len, prompts))
    request.check_context(model, longest)
    needed = longest + request.max_new_tokens - 1
    if request.cache_capacity is not None and request.cache_capacity < needed:
        raise ValueError(
            f"The cache must hold the longest prompt and all new tokens but the last, {needed} tokens; got "
            f"cache_capacity={request.cache_capacity}. Raise it, or leave it out."
        )
    kept: dict[str, Any] = dict(prefill=request.prefill, decode=request.decode)
    talk = Conversation(model, request.cache_capacity or needed, **kept, prefill_chunk=request.prefill_chunk)
    return _continued(talk, request, prompts)


def _continued(talk: Conversation, request: Request, prompts: Sequence[Sequence[int]]) -> Iterator[Continued]:
    drawn = None if request.key is None or isinstance(request.sampling, Greedy) else row_keys(request.key, len(prompts))
    names = ("max_new_tokens", "sampling", "eos", "beyond_context")
    turn: dict[str, Any] = {name: getattr(request, name) for name in names}
    assert request.prefill is not None
    before: Sequence[int] = ()
    for number, prompt in enumerate(prompts):
        size = request.prefill.tokens_per_block(talk.model.prefill_gate)
        shared = _shared(request.prefill, before, prompt, size)
        read = talk.rewind(shared)
        key = None if drawn is None else drawn[number : number + 1]
        yield Continued(talk.generate(prompt[shared:], key=key, **turn), len(prompt) - read)
        before = prompt


def _shared(policy: Policy, before: Sequence[int], prompt: Sequence[int], block_size: int) -> int:
    """The first tokens of a prompt that were read before it as they would be now; at least one is left to be read."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, prompt[:-1], strict=False))
    same = sum(1 for _ in pairs)
    if not same:
        return 0
    return min(same, policy.rows_alike(len(before), len(prompt), block_size) * block_size)

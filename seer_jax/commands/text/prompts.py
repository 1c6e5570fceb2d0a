"""Many prompts from a file, one after the other, of which each reads only what is new: generate --prompts."""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from seer_jax.commands.arguments import model_of
from seer_jax.commands.text.generation import (
    chosen_policies,
    failure_of,
    has_failed,
    load_model,
    recommended_sampling,
    tell_policies,
)
from seer_jax.inference.conversation import Conversation
from seer_jax.inference.conversation.shared_prefix import Continued, generate_each
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy
from seer_jax.inference.text import Tokenizer
from seer_jax.models.pretrained import load_tokenizer
from seer_jax.text_files import parse_json, read_text

if TYPE_CHECKING:
    from seer_jax.commands.generate import GenerateConfig

_EXAMPLE = '{"prompt": "..."}'


def continue_prompts(config: "GenerateConfig", path: Path) -> bool:
    """Writes a line of JSON for each prompt of a file: its number, the tokens that were read for it, the new ones, and their text. Where
    logits were not finite, `failed_at` is the number of the new token at which it ends.

    Args:
      config: of `seer-jax generate`.
      path: JSON lines, each a text or an object such as {"prompt": "..."}.

    Returns:
      Whether all went well.
    """
    name = model_of(config.model, config.gates, config.hub, config.adapter)
    tokenizer = load_tokenizer(name, **config.hub)
    if config.chat:
        tokenizer.encode_turn("Hello", [], system=config.system)  # which refuses models without a template
    places = {place: _tokens(config, tokenizer, text, place) for place, text in _texts(path)}
    prompts = list(places.values())
    shapes = load_model(config, name, tokenizer, chat=config.chat, abstract=True)
    names = "max_new_tokens", "prefill", "decode", "prefill_chunk", "beyond_context", "sampling"
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    request = Request.of(shapes, **settings)
    longest = max(map(len, prompts))
    with _named(max(places, key=lambda place: len(places[place]))):
        request.check_context(shapes, longest)
    policies: dict[str, Any] = dict(prefill=request.prefill, decode=request.decode)
    capacity = longest + config.max_new_tokens - 1
    Conversation.check(shapes, capacity, prefill_chunk=config.prefill_chunk, **policies)
    tell_policies(chosen_policies(config, shapes, request), config)
    if config.stats and (recommendation := recommended_sampling(config, name)):
        print(recommendation, file=sys.stderr)
    model = load_model(config, name, tokenizer, chat=config.chat)
    if not isinstance(config.sampling, Greedy):
        settings["key"] = jax.random.key(config.seed or 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Logits must be finite", RuntimeWarning)  # `failure_of` tells it
        read, failures = 0, list[str]()  # of the results nothing else is kept: there may be many
        for number, continued in enumerate(generate_each(model, prompts, **settings), start=1):
            _write(number, continued, tokenizer)
            read += continued.read
            if has_failed(continued.result):
                failures.append(failure_of(continued.result, f"generate: prompt {number}"))
    if config.stats:
        print(f"[{len(prompts)} prompts, {sum(map(len, prompts))} tokens, of which {read} were read]", file=sys.stderr)
    for line in failures:
        print(line, file=sys.stderr)
    return not failures


def _write(number: int, continued: Continued, tokenizer: Tokenizer) -> None:
    (new,) = continued.result.rows()
    line = dict(prompt=number, read_tokens=continued.read, new_tokens=len(new), text=tokenizer.decode_known(new))
    if has_failed(continued.result):
        line["failed_at"] = int(continued.result.failed[0])
    print(json.dumps(line, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Puts the place of a prompt before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """The prompts of a file, each after its place."""
    found = False
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            value = parse_json(line, f"{place}, a line of prompts,")
            text = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(
                    f"{place} must be a JSON text, or an object such as {_EXAMPLE}; got {str(value)[:60]!r}."
                )
            found = True
            yield place, text
    if not found:
        raise ValueError(f"{path} must hold at least one prompt; got none. Write each as a line of JSON.")


def _tokens(config: "GenerateConfig", tokenizer: Tokenizer, text: str, place: str) -> list[int]:
    with _named(place):
        if config.chat:
            return tokenizer.encode_turn(text, [], system=config.system)
        if not (tokens := tokenizer.encode(text)):
            raise ValueError("a prompt must have at least one token; got an empty text. Leave it out.")
        return tokens

"""Text to tokens and back: a model's tokenizer and chat template, and text that appears while tokens stream in."""

import functools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seer_jax.gguf.header import is_gguf, read_header
from seer_jax.gguf.tokenizer import tokenizer_of
from seer_jax.inference import chat
from seer_jax.inference.chat import Message
from seer_jax.models.hub import read_optional

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKEN_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")
TOKENIZER_PATTERNS = (
    *("tokenizer.json", *SPECIAL_TOKEN_FILES, "chat_template*", "additional_chat_templates/*"),
    *("vocab.json", "added_tokens.json", "merges.txt", "tokenizer.model"),
)
REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 (yet) decode to


class Tokenizer:
    """The tokenizer of a Hugging Face model folder, or of a GGUF file.

    Attributes:
      place: where it was read, for messages.
      special: the special tokens that chat templates may use, such as bos_token, as text.
      chat_templates: Jinja sources by name; "default" is the usual one, "tool_use" the one for tools where a model has two.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        special: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        place: str = "this tokenizer",
    ):
        # Limits that training may have left in tokenizer.json would cut prompts short without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special = dict(special or {})
        self.chat_templates = dict(chat_templates or {})
        self.place = place

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a model folder, or rebuilds that of a GGUF file.

        Raises:
          FileNotFoundError: the folder, the file or its tokenizer is not there.
          ValueError: a file is damaged.
        """
        folder = Path(folder)
        config = read_optional(folder, TOKENIZER_CONFIG)
        return cls(
            tokenizer_of(read_header(folder)) if is_gguf(folder) else _load_backend(folder),
            special=_special_tokens(folder, config),
            chat_templates=chat.load_templates(folder, config),
            place=str(folder),
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text.

        Args:
          text: any; the names of special tokens in it become those tokens.
          special_tokens: whether to add those that the model's texts begin or end with (Llama: BOS in front).

        Raises:
          ValueError: it is no text, or holds half a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise ValueError(f"A text must be of type str; got {text!r}.")
        try:
            return self._backend.encode(text, add_special_tokens=special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise ValueError(
                f"A text must be valid Unicode; got the lone surrogate {text[at]!a} at character {at}. Decode its bytes as UTF-8, or "
                "remove it."
            ) from error

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD.

        Args:
          tokens: integers, those of one text.
          skip_special_tokens: whether to leave out those that mark beginnings and ends.

        Raises:
          ValueError: they are no integers, or none of the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"Tokens of a text must be integers [T]; got {reprlib.repr(tokens)}.")
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"Tokens must lie in [0, {self.vocab_size}), the vocabulary of the tokenizer; got {wrong[0]}. Use the tokenizer of their "
                "model."
            )
        return self.decode_known(ids.tolist(), skip_special_tokens=skip_special_tokens)

    def decode_known(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As `decode`, for tokens that a model made; those beyond the tokenizer's vocabulary, to which models are padded, are no text."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The text of its `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def stream(self) -> "TextStream":
        """A decoder for tokens that arrive one after the other."""
        return TextStream(self)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """A conversation as the text that the model was trained on, as transformers renders it.

        Args:
          messages: each with `role` and `content`, or what else the template knows, such as `tool_calls`.
          add_generation_prompt: end with the beginning of the model's answer.
          **variables: `tools`, and further ones that the template knows, for example enable_thinking=False (Qwen3).

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        given: dict[str, Any] = dict(self.special, add_generation_prompt=add_generation_prompt) | variables
        return chat.render(self.chat_templates, messages, place=self.place, **given)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Tokens of a conversation, see `render_chat`; the template writes all special tokens itself."""
        return self.encode(self.render_chat(messages, **variables), special_tokens=False)

    def encode_turn(
        self, message: str, so_far: Sequence[int], *, system: str | None = None, **variables: Any
    ) -> list[int]:
        """Tokens of a user's message behind a conversation, up to the beginning of the answer.

        Args:
          message: its text.
          so_far: tokens of the conversation, which ends with an answer; none: the message begins it.
          system: system message, where the message begins the conversation.
          **variables: see `render_chat`.

        Raises:
          ValueError: the model has no chat template, or its template shows no answers.
        """
        user = dict(role="user", content=message)
        if not len(so_far):
            return self.encode_chat(
                [*([] if system is None else [dict(role="system", content=system)]), user], **variables
            )
        # What the template writes behind an answer does not depend on what comes before the answer.
        earlier = [dict(role="user", content="question"), dict(role="assistant", content=chat.ANSWER)]
        _, answered, tail = self.render_chat([*earlier, user], **variables).partition(chat.ANSWER)
        if not answered:
            raise ValueError(
                f"The chat template of {self.place} must show earlier answers; it leaves them out. Use `generate`."
            )
        tokens = self.encode(tail, special_tokens=False)
        ended = tokens[:1] == list(so_far[-1:]) and tokens[0] in self.end_of_turn()
        return tokens[ended:]

    def end_of_turn(self) -> tuple[int, ...]:
        """The token with which the chat template ends an answer, such as <|im_end|>; () where it ends with none, or there is no template.

        Models whose EOS tokens lack it do not stop in a chat: pass `eos=(*model.config.eos_token_ids, *tokenizer.end_of_turn())`.
        """
        question, answer = dict(role="user", content="question"), dict(role="assistant", content="the answer")
        try:
            text = self.render_chat([question, answer], add_generation_prompt=False)
        except ValueError:  # there is none, or it wants other conversations
            return ()
        _, _, tail = text.rpartition(answer["content"])
        first = self.encode(tail.lstrip(), special_tokens=False)[:1]
        return tuple(token for token in first if token in self._backend.get_added_tokens_decoder())


class TextStream:
    """Text of tokens that arrive one after the other.

    A character may be spread over several tokens: it is held back until it is complete. All the pieces joined are what
    `decode` gives for all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Some decoders treat the start of a text differently, so what is new is told by decoding it after known text.
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, tokens: Iterable[int]) -> str:
        """Adds tokens; returns the text that is now complete."""
        return "".join(self._push(token) for token in tokens)

    def _push(self, token: int) -> str:
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode_known(self._context)
        return text

    def finish(self) -> str:
        """Returns what was held back, complete or not."""
        text = self._new_text()
        self._context, self._context_text, self._pending = [], "", []
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode_known(self._context + self._pending)[len(self._context_text) :]


def _load_backend(folder: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} must be a file of the tokenizers package; {error}. Download it again.") from error
    if not any(next(folder.glob(name), None) for name in TOKENIZER_PATTERNS):
        raise FileNotFoundError(
            f"Text needs the model's tokenizer: expected tokenizer.json in {str(folder)!r}, which has none. Save it there with "
            "transformers' save_pretrained."
        )
    with chat.quiet_transformers():  # takes seconds to import; knows how to convert the older files
        from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:  # the converters of older files raise whatever their packages do, ImportError among them
        raise ValueError(
            f"{folder} has no tokenizer.json, and its other tokenizer files can't be converted: {error}. Save the tokenizer "
            "with transformers' save_pretrained, which writes tokenizer.json."
        ) from error
    return backend


def eos_token_of(folder: Path) -> int | None:
    """The id of the tokenizer's end-of-text token, without loading the tokenizer; None where its files do not say."""
    config = read_optional(folder, TOKENIZER_CONFIG)
    name = _special_tokens(folder, config).get("eos_token")
    if name is None:
        return None
    listed = config.get("added_tokens_decoder")
    entries = [(int(i), token) for i, token in listed.items() if i.isdecimal()] if isinstance(listed, Mapping) else []
    ids = [i for i, token in entries if _content(token) == name]
    if not ids:
        added = read_optional(folder, "tokenizer.json").get("added_tokens") or []
        ids = [token.get("id") for token in added if isinstance(token, Mapping) and token.get("content") == name]
    return next((i for i in ids if isinstance(i, int)), None)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, as transformers reads them: special_tokens_map.json counts where the configuration lists no added tokens."""
    older = {} if "added_tokens_decoder" in config else read_optional(folder, "special_tokens_map.json")
    tokens = {name: token for name, token in {**config, **older}.items() if name.endswith("_token") and token}
    return {name: _content(token) for name, token in tokens.items() if isinstance(token, (str, dict))}


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise ValueError(f"A special token of tokenizer_config.json must be a text or have content; got {token!r}.")
    return content

"""Text to tokens and back: a model's tokenizer and chat template, and text that appears while tokens stream in."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_jax.models.hub import read_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 (yet) decode to

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Attributes:
      place: where it was read, for messages.
      special: the special tokens that chat templates may use, such as bos_token, as text.
      chat_template: Jinja source, or None where the model has none.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        place: str = "this tokenizer",
    ):
        # Limits that training may have left in tokenizer.json would cut prompts short without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special = dict(special or {})
        self.chat_template = chat_template
        self.place = place

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a model folder.

        Raises:
          FileNotFoundError: the folder or its tokenizer is not there.
          ValueError: a file is damaged.
        """
        folder = Path(folder)
        config = _read_optional(folder / "tokenizer_config.json")
        tokens = _read_optional(folder / "special_tokens_map.json") | config
        names = [name for name in tokens if name.endswith("_token") and tokens[name]]
        return cls(
            _load_backend(folder),
            special={name: _content(tokens[name]) for name in names if isinstance(tokens[name], (str, dict))},
            chat_template=_load_template(folder, config),
            place=str(folder),
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text.

        Args:
          text: any; the names of special tokens in it become those tokens.
          special_tokens: whether to add those that the model's texts begin or end with (Llama: BOS in front).
        """
        return self._backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def stream(self) -> "TextStream":
        """A decoder for tokens that arrive one after the other."""
        return TextStream(self)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """A conversation as the text that the model was trained on.

        Args:
          messages: each with `role` and `content`.
          add_generation_prompt: end with the beginning of the model's answer.
          **variables: further ones that the template knows, for example enable_thinking=False (Qwen3).

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        import jinja2

        if self.chat_template is None:
            raise ValueError(
                f"A conversation needs a chat template (chat_template.jinja, or in tokenizer_config.json); {self.place} has "
                "none. It may be a base model: give plain text instead."
            )
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"A message must be a mapping with role and content; got {message!r}.")
        given = dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
        try:
            return _environment().from_string(self.chat_template).render(**given | self.special | variables)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template of {self.place} does not accept this conversation: {error}."
            ) from error

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Tokens of a conversation, see `render_chat`; the template writes all special tokens itself."""
        return self.encode(self.render_chat(messages, **variables), special_tokens=False)


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
        self._context_text = self._tokenizer.decode(self._context)
        return text

    def finish(self) -> str:
        """Returns what was held back, complete or not."""
        text = self._new_text()
        self._context, self._context_text, self._pending = [], "", []
        return text

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]


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
    from transformers import AutoTokenizer  # takes seconds to import; knows how to convert the older files

    try:
        backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} has no tokenizer.json, and its other tokenizer files can't be converted: {error}. Save the tokenizer "
            "with transformers' save_pretrained, which writes tokenizer.json."
        ) from error
    return backend


def _load_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own comes before the entry of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several with names
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _environment() -> Any:
    """Jinja as transformers sets it up. It is sandboxed: templates come from wherever the model does."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment

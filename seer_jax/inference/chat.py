"""Chat templates: where a model keeps them, and conversations rendered by transformers' own renderer."""

import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seer_jax.text_files import read_text

Message = Mapping[str, Any]
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates, where a model has several
ANSWER = "the-answer-that-was-given-before"  # stands for an answer in a conversation that is rendered
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message that hold its reasoning, as transformers knows them
_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_IMPORTING = threading.Lock()

# What the evaluation of a template may raise besides jinja2's own errors.
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def load_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a model folder by name: files come before the entry of tokenizer_config.json, as in transformers.

    Args:
      folder: of the model.
      config: its parsed tokenizer_config.json.

    Raises:
      ValueError: a file is no UTF-8 text, or the entry is neither a text nor a list of named ones.
    """
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: read_text(path) for name, path in files.items() if path.is_file()}
    return found or _named(config.get("chat_template"), f"{folder / 'tokenizer_config.json'}: chat_template")


def is_template_text(source: str) -> bool:
    """Whether a template is given as Jinja text, which has a brace or several lines, and not as the path of a file."""
    return "{" in source or "\n" in source


def read_template(source: str) -> str:
    """A chat template given as Jinja text or as the path of a file.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: the file is no UTF-8 text.
    """
    if is_template_text(source):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"chat_template must be Jinja text or a file of it; got {source!r}, which is no file.")
    return read_text(path)


def _named(entry: Any, place: str) -> dict[str, str]:
    match entry:
        case None:
            return {}
        case str():
            return {DEFAULT: entry}
        case list():
            named = [(e.get("name"), e.get("template")) for e in entry if isinstance(e, dict)]
            texts = {name: source for name, source in named if isinstance(name, str) and isinstance(source, str)}
            if len(texts) == len(entry):
                return texts
    raise ValueError(f"{place} must be a text, or a list of objects with name and template; got {str(entry)[:60]!r}.")


def render(
    templates: Mapping[str, str],
    messages: Sequence[Message],
    *,
    place: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """A conversation as text, token for token as `apply_chat_template` of transformers.

    Args:
      templates: by name; with tools the one named tool_use, where there is one.
      messages: each with `role` and `content`, or what else the template knows, such as `tool_calls`. Keys that are None are left out.
      place: of the templates, for messages.
      add_generation_prompt: end with the beginning of the model's answer.
      tools: JSON schemas or functions.
      **variables: special tokens and further variables.

    Raises:
      ValueError: there is no template, a message is malformed, or the template refuses the conversation.
    """
    template = templates.get(TOOL_USE if tools and TOOL_USE in templates else DEFAULT)
    if template is None:
        named = f" (only {', '.join(templates)})" if templates else ""
        raise ValueError(
            f"A conversation needs a chat template (chat_template.jinja, or in tokenizer_config.json); {place} has "
            f"none{named}. It may be a base model: give plain text instead."
        )
    given = dict(tools=tools, documents=None, add_generation_prompt=add_generation_prompt) | variables
    chat = _checked(messages)
    import jinja2

    try:
        rendered, _ = _renderer()(conversations=[chat], chat_template=template, **given)
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        text = f"{error}".rstrip(".") or type(error).__name__
        raise ValueError(f"The chat template of {place} does not accept this conversation: {text}.") from error
    return rendered[0]


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without keys that are None, as transformers leaves them out."""
    if isinstance(messages, (str, bytes, Mapping)) or not len(messages):
        raise ValueError(f"A conversation must be a list of at least one message; got {messages!r}.")
    chat = []
    for message in messages:
        kept = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        if "role" not in kept or len(kept) < 2:
            raise ValueError(f"A message must be a mapping with role and content; got {message!r}.")
        chat.append(kept)
    return chat


@functools.cache
def _renderer() -> Any:
    with quiet_transformers():
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While transformers is imported here, it does not say that PyTorch is missing: it is not needed."""
    with _IMPORTING:  # documents are rendered by several threads, which share the environment
        before = os.environ.get(_QUIET)
        os.environ[_QUIET] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_QUIET]
            else:
                os.environ[_QUIET] = before


def content_of(message: Message) -> str:
    """The text of a message: its content, of which parts are joined, and its reasoning."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    return "".join(text for text in (reasoning, *texts) if isinstance(text, str))

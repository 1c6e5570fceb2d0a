"""Documents as tokens: the tokenizer, and tokens from sources or from the store of an earlier part of the run."""

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from seer_jax.folders import files_of
from seer_jax.inference.chat import DEFAULT, content_of, is_template_text, read_template
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.train.data.sources import Document, SourceConfig, list_files, read_documents
from seer_jax.train.data.store import Chunk, Identity, TokenStore, join, read_store, write_store

DOCUMENTS_PER_BATCH = 256  # enough to keep the tokenizer's threads busy
LOST_SHARE = 0.1  # of the messages' characters, from which on a template that leaves them out is told
PIECE_LENGTH = 2**20  # characters of a long text that are tokenized at once
SECONDS_PER_LINE = 5.0  # from one line about the reading to the next


@runtime_checkable
class Tokenizer(Protocol):
    """Turns documents into tokens."""

    fingerprint: str

    def encode(self, documents: Sequence[Document]) -> Sequence[Sequence[int]]:
        """Tokens of each document, with the special tokens at its start and end."""
        ...


class ModelTokenizer:
    """The tokenizer of a model, for training text.

    Texts get the special tokens that the tokenizer adds by itself (Llama: BOS in front; Qwen: none); chats are rendered by its chat
    template, which includes them. The end-of-text token is appended to each document that does not end in it.
    """

    def __init__(self, model: str, chat_template: str | None = None):
        """
        Args:
          model: its folder or hub id.
          chat_template: Jinja text, or the file of it, in place of the model's own.
        """
        from seer_jax.models.pretrained import load_tokenizer

        self._tokenizer = load_tokenizer(model)
        self._warned = False
        end = self._tokenizer.special.get("eos_token")
        self._end = [] if end is None else self._tokenizer.encode(end, special_tokens=False)
        folder, digest = Path(self._tokenizer.place), hashlib.sha256()
        if folder.is_file():  # that of the whole model, of which the tokenizer is a small part
            digest.update(self._tokenizer.to_json().encode())
        for path in files_of(folder, TOKENIZER_PATTERNS) if folder.is_dir() else ():
            digest.update(path.read_bytes())
        if chat_template is not None:
            template = read_template(chat_template)
            self._tokenizer.chat_templates = {DEFAULT: template}
            self._tokenizer.place = "the training data" if is_template_text(chat_template) else chat_template
            digest.update(template.encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """Tokens of each document.

        Warns, once, where the chat template leaves out much of what the messages say.
        """
        with ThreadPoolExecutor() as threads:  # the tokenizer releases Python's lock
            texts = list(threads.map(self._render, documents))
            self._check_rendered(documents, texts)
            return list(threads.map(self._encode, documents, texts))

    def _render(self, document: Document) -> str:
        if isinstance(document, str):
            return document
        try:
            return self._tokenizer.render_chat(document, add_generation_prompt=False)
        except ValueError as error:
            raise ValueError(f"{error} Correct the chat, or set another template by `data.chat_template`.") from error

    def _check_rendered(self, documents: Sequence[Document], texts: Sequence[str]) -> None:
        """Counts the characters of messages that exceed the rendered text, and so are certainly not in it."""
        chats = [(d, text) for d, text in zip(documents, texts, strict=True) if not isinstance(d, str)]
        said = [sum(len(content_of(message)) for message in chat) for chat, _ in chats]
        lost = [max(0, count - len(text)) for count, (_, text) in zip(said, chats, strict=True)]
        if not self._warned and sum(lost) > LOST_SHARE * sum(said):
            self._warned = True
            warnings.warn(
                f"The chat template of {self._tokenizer.place} leaves out at least {sum(lost):,} of {sum(said):,} characters, in "
                f"{sum(n > 0 for n in lost):,} of the first {len(chats):,} chats: those of reasoning models remove what stands before "
                "</think>. To train on it, set chat_template (--data.chat-template) to a file with a template that keeps it.",
                stacklevel=2,
            )

    def _encode(self, document: Document, text: str) -> list[int]:
        if isinstance(document, Piece):
            return self._encode_piece(document)
        tokens = self._tokenizer.encode(text, special_tokens=isinstance(document, str))
        return tokens if tokens[-len(self._end) :] == self._end else tokens + self._end

    def _encode_piece(self, piece: "Piece") -> list[int]:
        """Tokens of a part of a text, with the special tokens of the whole at its start and end alone."""
        tokens = self._tokenizer.encode(piece, special_tokens=piece.first)
        size = len(self._end)
        if size and tokens[-size:] == self._end:
            tokens = tokens[:-size]
        return tokens + self._end if piece.last else tokens


class Piece(str):
    """A part of a long text.

    Attributes:
      first, last: whether it is the first or the last of them.
    """

    first = last = False

    @classmethod
    def split(cls, text: str) -> Iterator["Piece"]:
        """The parts of a text, cut at the ends of lines or else between words where it has any."""
        start = 0
        while start < len(text):
            end = start + PIECE_LENGTH
            if end < len(text):
                cut = max(text.rfind("\n", start, end) + 1, 0) or text.rfind(" ", start + 1, end)
                end = cut if cut > start else end
            piece = cls(text[start:end])
            piece.first, piece.last = start == 0, end >= len(text)
            yield piece
            start = end


def load_tokens(
    config: SourceConfig,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    *,
    enough: Callable[[int], bool] | None = None,
    limit: Any = None,
    resumes: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> TokenStore:
    """Reads and tokenizes the sources, or reads back the tokens that the same run kept in `cache`.

    A run that resumes must see the same tokens, so its cached ones are used even if files have changed since, which it says. A run that
    starts reads changed files again.

    Args:
      config: the sources.
      tokenizer: of the model.
      cache: a folder; None: tokens are kept in memory only.
      enough: called with each document's number of tokens; True ends the reading after it. None: all are read.
      limit: what `enough` stands for, JSON: a run that starts uses cached tokens only if they were read up to the same limit.
      resumes: whether a run goes on that has trained on these tokens.
      say: shows a line about the progress.

    Raises:
      ValueError: a run resumes, and the cache has the tokens of other sources.
    """
    settings = {"sources": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint}
    identity = Identity(json.loads(json.dumps(settings)), limit, {})
    stored = None if cache is None else read_store(cache)
    if cache is not None and stored is not None and (store := _usable(stored, identity, config, cache, resumes, say)):
        return store
    if resumes and cache is not None:
        say(f"{cache} does not hold the run's tokens, or they are damaged; its text is read again.")
    files = _stamps(config)
    chunks = _encoded(read_documents(config), tokenizer, config.max_tokens, enough, say)
    if cache is None:
        return TokenStore.from_documents(join(chunks))
    return write_store(cache, dataclasses.replace(identity, files=files), chunks)


def _usable(
    stored: tuple[Identity, TokenStore],
    wanted: Identity,
    config: SourceConfig,
    folder: Path,
    resumes: bool,
    say: Callable[[str], None],
) -> TokenStore | None:
    """The stored tokens where this run may train on them; None where its text must be read (again)."""
    identity, store = stored
    if not resumes:
        same = (identity.settings, identity.limit) == (wanted.settings, wanted.limit)
        return store if same and identity.files == _stamps(config) else None
    if identity.settings != wanted.settings:
        differing = [name for name in wanted.settings if identity.settings.get(name) != wanted.settings[name]]
        raise ValueError(
            f"{folder} must hold the tokens of this run; they are of other {' and '.join(differing)}. Restore the text and the "
            "model's tokenizer, or give another `output` for a new run."
        )
    if changed := _changed(identity.files):
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        say(f"{changed[0]}{more} changed since this run began; it goes on with the text as it was then.")
    return store


def _encoded(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    enough: Callable[[int], bool] | None,
    say: Callable[[str], None],
) -> Iterator[Chunk]:
    """Tokens of the documents, those of long texts piece by piece: (tokens, whether they go on with the document before)."""
    total = number = 0
    told = time.monotonic()
    for batch in _batched(_pieces(documents)):
        for document, tokens in zip(batch, tokenizer.encode(batch), strict=True):
            continues = isinstance(document, Piece) and not document.first
            yield np.asarray(tokens, np.int32), continues
            total, number = total + len(tokens), number + (not continues)
            if max_tokens is not None and total >= max_tokens:
                return
            if max_tokens is None and enough is not None and enough(len(tokens)):
                say(
                    f"Read {number:,} documents, {total:,} tokens: as many as the run takes. For a wider choice set max_tokens of the data (--data.max-tokens)."
                )
                return
        if time.monotonic() - told >= SECONDS_PER_LINE:
            told = time.monotonic()
            say(f"Reading text: {number:,} documents, {total:,} tokens so far")


def _pieces(documents: Iterator[Document]) -> Iterator[Document]:
    for document in documents:
        if isinstance(document, str) and len(document) > PIECE_LENGTH:
            yield from Piece.split(document)
        else:
            yield document


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents to tokenize at once: few at first, so that a run that needs little text does not wait for more."""
    batch: list[Document] = []
    size, most = 0, PIECE_LENGTH // 16
    for document in documents:
        batch.append(document)
        size += sum(map(len, (document,) if isinstance(document, str) else map(str, document)))
        if size >= most or len(batch) == DOCUMENTS_PER_BATCH:
            yield batch
            batch, size, most = [], 0, min(2 * most, 16 * PIECE_LENGTH)
    if batch:
        yield batch


def _stamps(config: SourceConfig) -> dict[str, list[int]]:
    return {str(path): _stamp(path) for path in list_files(config)}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _changed(files: dict[str, list[int]]) -> list[str]:
    """The files that are no longer as they were read."""
    return [name for name, stamp in files.items() if not Path(name).is_file() or _stamp(Path(name)) != stamp]

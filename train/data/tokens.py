"""Documents as tokens: the tokenizer, and a store on disk that a resumed run reads back."""

import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from seer_jax.inference.chat import DEFAULT, content_of, read_template
from seer_jax.inference.text import TOKENIZER_PATTERNS
from seer_jax.train.data.sources import Document, SourceConfig, read_documents

DOCUMENTS_PER_BATCH = 256  # enough to keep the tokenizer's threads busy
LOST_SHARE = 0.1  # of the messages' characters, from which on a template that leaves them out is told


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
        for path in sorted({path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)}):
            digest.update(path.read_bytes())
        if chat_template is not None:
            template = read_template(chat_template)
            self._tokenizer.chat_templates = {DEFAULT: template}
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
        return self._tokenizer.render_chat(document, add_generation_prompt=False)

    def _check_rendered(self, documents: Sequence[Document], texts: Sequence[str]) -> None:
        """Counts the characters of messages that exceed the rendered text, and so are certainly not in it."""
        chats = [(d, text) for d, text in zip(documents, texts, strict=True) if not isinstance(d, str)]
        said = [sum(len(content_of(message)) for message in chat) for chat, _ in chats]
        lost = [max(0, count - len(text)) for count, (_, text) in zip(said, chats, strict=True)]
        if not self._warned and sum(lost) > LOST_SHARE * sum(said):
            self._warned = True
            warnings.warn(
                f"The chat template of {self._tokenizer.place} leaves out at least {sum(lost):,} of {sum(said):,} characters of the "
                f"first {len(chats):,} conversations, in {sum(n > 0 for n in lost):,} of them: those of reasoning models remove what stands "
                "before </think>. To train on it, set chat_template (--data.chat-template) to a file with a template that keeps it.",
                stacklevel=2,
            )

    def _encode(self, document: Document, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, special_tokens=isinstance(document, str))
        return tokens if tokens[-len(self._end) :] == self._end else tokens + self._end


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokens of many documents, concatenated.

    Attributes:
      tokens: of all documents, int32; a memory map where they are on disk.
      ends: one past the last token of each document, ascending.
      digest: hash of both, by which a resumed run recognises its data.
    """

    tokens: Int[np.ndarray, "tokens"]
    ends: Int[np.ndarray, "documents"]
    digest: str

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int] | np.ndarray]) -> "TokenStore":
        """The store of tokenized documents; empty ones are left out."""
        arrays = [np.asarray(d, np.int32) for d in documents if len(d)]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        ends = np.cumsum([len(a) for a in arrays], dtype=np.int64)
        return cls(tokens, ends, _digest(tokens, ends))

    @property
    def lengths(self) -> Int[np.ndarray, "documents"]:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)

    def check_vocabulary(self, vocab_size: int) -> "TokenStore":
        """Raises ValueError where a token is outside the model's vocabulary."""
        if len(self.tokens):
            check_tokens(self.tokens, vocab_size)
        return self


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError unless all tokens lie in [0, vocab_size)."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"Tokens must lie in [0, {vocab_size}), the model's vocabulary; got {low} .. {high}. "
            "Use the tokenizer that belongs to the model."
        )


def load_tokens(config: SourceConfig, tokenizer: Tokenizer, cache: Path | None = None) -> TokenStore:
    """Reads and tokenizes the sources, or reads back the tokens that an earlier run with the same settings kept in `cache`.

    A resumed run must see the same tokens, so cached ones are used even if the files have changed since; delete the folder to read the
    files again.

    Args:
      config: the sources.
      tokenizer: of the model.
      cache: a folder; None: tokens are kept in memory only.
    """
    fingerprint = json.dumps([dataclasses.asdict(config), tokenizer.fingerprint], sort_keys=True)
    if cache is not None and (stored := _read_store(cache, fingerprint)):
        return stored
    chunks = _encoded(read_documents(config), tokenizer, config.max_tokens)
    if cache is None:
        return TokenStore.from_documents(chunks)
    _write_store(cache, fingerprint, chunks)
    stored = _read_store(cache, fingerprint)
    assert stored is not None
    return stored


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer, max_tokens: int | None) -> Iterator[np.ndarray]:
    total = 0
    for batch in itertools.batched(documents, DOCUMENTS_PER_BATCH):
        for tokens in tokenizer.encode(batch):
            yield np.asarray(tokens, np.int32)
            total += len(tokens)
            if max_tokens is not None and total >= max_tokens:
                return


def _write_store(folder: Path, fingerprint: str, documents: Iterator[np.ndarray]) -> None:
    """Writes the tokens first and the description last, each renamed into place, so that an incomplete store is not read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.json").unlink(missing_ok=True)
    lengths = []
    with (folder / "tokens.part").open("wb") as file:
        for tokens in documents:
            if len(tokens):
                file.write(tokens.tobytes())
                lengths.append(len(tokens))
    os.replace(folder / "tokens.part", folder / "tokens.int32")
    ends = np.cumsum(lengths, dtype=np.int64)
    np.save(folder / "ends.npy", ends)
    description = {"settings": fingerprint, "digest": _digest(_map_tokens(folder), ends)}
    (folder / "store.part").write_text(json.dumps(description))
    os.replace(folder / "store.part", folder / "store.json")


def _read_store(folder: Path, fingerprint: str) -> TokenStore | None:
    if not (folder / "store.json").exists():
        return None
    description: dict[str, Any] = json.loads((folder / "store.json").read_text())
    if description["settings"] != fingerprint:
        return None
    return TokenStore(_map_tokens(folder), np.load(folder / "ends.npy"), description["digest"])


def _map_tokens(folder: Path) -> np.ndarray:
    path = folder / "tokens.int32"
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def _digest(tokens: np.ndarray, ends: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(ends, np.int64).data, digest_size=16)
    for start in range(0, len(tokens), 1 << 24):
        digest.update(np.ascontiguousarray(tokens[start : start + (1 << 24)], np.int32).data)
    return digest.hexdigest()

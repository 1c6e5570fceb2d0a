"""Tokens of documents on disk: a store that a resumed run reads back, with what it was made from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from seer_jax.convert.files import replacing_files

# Tokens, and whether they go on with the document before.
Chunk = tuple[np.ndarray, bool]


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


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a store on disk was made from.

    Attributes:
      settings: sources and tokenizer.
      limit: up to where the sources were read.
      files: size and time of change of each file when it was read.
    """

    settings: dict[str, Any]
    limit: Any
    files: dict[str, list[int]]


def write_store(folder: Path, identity: Identity, chunks: Iterator[Chunk]) -> TokenStore:
    """Writes tokens, ends of documents and description as one step; the old store stays until the new one is complete."""
    lengths = []
    with replacing_files(folder, key="store.json") as files:
        with files.path("tokens.int32").open("wb") as file:
            for tokens, continues in chunks:
                file.write(tokens.tobytes())
                if continues and lengths:
                    lengths[-1] += len(tokens)
                elif len(tokens):
                    lengths.append(len(tokens))
        ends = np.cumsum(lengths, dtype=np.int64)
        with files.path("ends.npy").open("wb") as file:
            np.save(file, ends)
        digest = _digest(_map_tokens(files.partial("tokens.int32")), ends)
        description = {**dataclasses.asdict(identity), "digest": digest}
        files.path("store.json").write_text(json.dumps(description), encoding="utf-8")
    return TokenStore(_map_tokens(folder / "tokens.int32"), ends, digest)


def read_store(folder: Path) -> tuple[Identity, TokenStore] | None:
    """The store in a folder; None where there is none, or a damaged one, with which no run could go on."""
    try:
        description = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        identity = Identity(description["settings"], description["limit"], description["files"])
        tokens, ends = _map_tokens(folder / "tokens.int32"), _read_ends(folder / "ends.npy")
        if _digest(tokens, ends) != description["digest"]:
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return identity, TokenStore(tokens, ends, description["digest"])


def _read_ends(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _map_tokens(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def _digest(tokens: np.ndarray, ends: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(ends, np.int64).data, digest_size=16)
    for start in range(0, len(tokens), 1 << 24):
        digest.update(np.ascontiguousarray(tokens[start : start + (1 << 24)], np.int32).data)
    return digest.hexdigest()


def join(chunks: Iterator[Chunk]) -> Iterator[np.ndarray]:
    """The tokens of each document."""
    parts: list[np.ndarray] = []
    for tokens, continues in chunks:
        if parts and not continues:
            yield np.concatenate(parts)
            parts = []
        parts.append(tokens)
    if parts:
        yield np.concatenate(parts)

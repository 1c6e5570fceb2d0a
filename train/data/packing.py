"""Packs documents into rows of equal length, block-aligned, so that no block holds tokens of two sequences."""

import bisect
import dataclasses
import enum
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from seer_jax.train.data.store import TokenStore


class Packing(enum.StrEnum):
    """How documents fill rows.

    CONCATENATE: one document after the other, cut into rows; each row is one sequence, also where it spans documents. The prefill recipe
      of SeerAttention.
    BEST_FIT: whole documents, longest first, each into the fullest row that still has room; attention stays within a document. The decode
      recipe of SeerAttention-R.
    """

    CONCATENATE = "concatenate"
    BEST_FIT = "best_fit"


class PackedRow(NamedTuple):
    """One row of T tokens, or several stacked `[B, T]`.

    Fields:
      tokens: 0 where there is none.
      segment_ids: 1 for the row's first sequence, 2 for its second, ...; 0 is padding.
      positions: of each token in its sequence; 0 at padding.
    """

    tokens: Int[np.ndarray, "*b T"]
    segment_ids: Int[np.ndarray, "*b T"]
    positions: Int[np.ndarray, "*b T"]


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """Counts of packing; `dropped_tokens` are those of dropped documents and cut ends."""

    documents: int
    tokens: int
    rows: int
    sequences: int
    dropped_documents: int
    split_documents: int
    dropped_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens -> "
            f"{self.rows:,} rows with {self.sequences:,} sequences; "
            f"{self.split_documents:,} documents split, {self.dropped_documents:,} dropped, "
            f"{self.dropped_tokens:,} tokens dropped"
        )


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """Rows of tokens, assembled on access.

    Attributes:
      tokens: of all documents, as in `TokenStore`.
      row_ends: one past the last span of each row.
      starts, lengths: of each span in `tokens`; a span is one sequence of a row.
      row_length: T.
      block_size: sequences start at its multiples.
      report: counts of packing.
      digest: hash of the tokens; with the settings it identifies the rows.
    """

    tokens: Int[np.ndarray, "tokens"]
    row_ends: Int[np.ndarray, "rows"]
    starts: Int[np.ndarray, "spans"]
    lengths: Int[np.ndarray, "spans"]
    row_length: int
    block_size: int
    report: PackingReport
    digest: str

    @classmethod
    def from_rows(cls, tokens: np.ndarray) -> "PackedDataset":
        """The dataset of full rows: integers [N, T], each row one sequence."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise ValueError(
                f"Rows of tokens must be integers [N, T] with N, T >= 1; got {tokens.dtype} {tokens.shape}."
            )
        rows, length = tokens.shape
        store = TokenStore.from_documents(list(tokens))
        report = PackingReport(rows, tokens.size, rows, rows, 0, 0, 0)
        starts = np.arange(rows, dtype=np.int64) * length
        return cls(store.tokens, np.arange(1, rows + 1), starts, np.full(rows, length), length, 1, report, store.digest)

    def take(self, rows: Int[np.ndarray, "some"]) -> "PackedDataset":
        """The dataset of some of the rows, in the given order; the report stays that of all."""
        firsts = np.concatenate([[0], self.row_ends[:-1]])
        spans = [np.arange(int(firsts[row]), int(self.row_ends[row])) for row in rows]
        chosen = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        return dataclasses.replace(
            self,
            row_ends=np.cumsum([len(span) for span in spans], dtype=np.int64),
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
        )

    def __len__(self) -> int:
        return len(self.row_ends)

    @functools.cached_property
    def row_tokens(self) -> Int[np.ndarray, "rows"]:
        """Tokens of each row, without padding."""
        return np.diff(np.cumsum(np.concatenate([[0], self.lengths]))[self.row_ends], prepend=0)

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"The index of a row must lie in [0, {len(self) - 1}]; got {index}.")
        row = PackedRow(*(np.zeros(self.row_length, np.int32) for _ in PackedRow._fields))
        first, last, offset = (int(self.row_ends[index - 1]) if index else 0), int(self.row_ends[index]), 0
        for segment, span in enumerate(range(first, last), start=1):
            start, length = int(self.starts[span]), int(self.lengths[span])
            place = slice(offset, offset + length)
            row.tokens[place] = self.tokens[start : start + length]
            row.segment_ids[place] = segment
            row.positions[place] = np.arange(length)
            offset += _aligned(length, self.block_size)
        return row


def pack(
    store: TokenStore, packing: Packing, *, row_length: int, block_size: int, min_length: int | None = None
) -> PackedDataset:
    """Packs documents into rows.

    Args:
      store: documents as tokens.
      packing: how.
      row_length: T, a multiple of `block_size`.
      block_size: b; every sequence starts at a multiple of it.
      min_length: BEST_FIT drops shorter sequences, tokens; None: two blocks, since shorter ones add nothing to the losses of gates.

    Raises:
      ValueError: the row length is no multiple of the block size, or no row can be filled.
    """
    if row_length < 1 or row_length % block_size:
        raise ValueError(
            f"The row length must be a positive multiple of {block_size} tokens, a block; got {row_length}."
        )
    min_length = shortest_sequence(min_length, row_length, block_size)
    if not 1 <= min_length <= row_length:
        raise ValueError(f"min_length must be at least 1 and at most the row length {row_length}; got {min_length}.")
    if not len(store.tokens):
        raise ValueError(
            "Training needs tokens; got only empty documents, or none. Check `data.paths` and `data.field`."
        )
    if packing is Packing.CONCATENATE:
        return _concatenate(store, row_length, block_size)
    return _best_fit(store, row_length, block_size, min_length)


def shortest_sequence(min_length: int | None, row_length: int, block_size: int) -> int:
    """`min_length`, or its default: two blocks."""
    return min(2 * block_size, row_length) if min_length is None else min_length


def _concatenate(store: TokenStore, row_length: int, block_size: int) -> PackedDataset:
    total, rows = len(store.tokens), len(store.tokens) // row_length
    if not rows:
        raise ValueError(
            f"Concatenated documents must fill a row of {row_length} tokens; got {total} tokens. "
            "Give more text or a smaller `sequence_length`."
        )
    first_row = (store.ends - store.lengths) // row_length
    split = int((first_row != (store.ends - 1) // row_length).sum())
    report = PackingReport(len(store.ends), total, rows, rows, 0, split, total - rows * row_length)
    starts = np.arange(rows, dtype=np.int64) * row_length
    spans = (np.arange(1, rows + 1), starts, np.full(rows, row_length))
    return PackedDataset(store.tokens, *spans, row_length, block_size, report, store.digest)


def _best_fit(store: TokenStore, row_length: int, block_size: int, min_length: int) -> PackedDataset:
    starts, lengths = _pieces(store, row_length)
    keep = lengths >= min_length
    if not keep.any():
        raise ValueError(
            f"A document must have at least {min_length} tokens, min_length; got at most {lengths.max()}. "
            "Lower min_length, or concatenate documents instead (Packing.CONCATENATE)."
        )
    dropped, starts, lengths = int(lengths[~keep].sum()), starts[keep], lengths[keep]
    rows = _place(-(-lengths // block_size), row_length // block_size)
    report = PackingReport(
        documents=len(store.ends),
        tokens=len(store.tokens),
        rows=len(rows),
        sequences=len(lengths),
        dropped_documents=int((store.lengths < min_length).sum()),
        split_documents=int((store.lengths > row_length).sum()),
        dropped_tokens=dropped,
    )
    order = np.concatenate([np.asarray(row) for row in rows])
    spans = (np.cumsum([len(row) for row in rows]), starts[order], lengths[order])
    return PackedDataset(store.tokens, *spans, row_length, block_size, report, store.digest)


def _place(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: items of each row, each item in the row whose room exceeds its size by least."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room they have left
    rooms: list[int] = []  # the sizes that occur in it, ascending, so that a search takes log(capacity)
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(int(item))
        left = by_room.setdefault(room - size, [])
        if not left:
            bisect.insort(rooms, room - size)
        left.append(row)
    return rows


def _pieces(store: TokenStore, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents, those longer than a row cut into rows and a remainder: (starts, lengths)."""
    document_lengths = store.lengths
    counts = -(-document_lengths // row_length)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = number * row_length
    starts = (store.ends - document_lengths)[document] + offset
    return starts, np.minimum(document_lengths[document] - offset, row_length)


def _aligned(length: int, block_size: int) -> int:
    return -(-length // block_size) * block_size

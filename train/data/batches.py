"""Batches in a seeded order that can be resumed at any point."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seer_jax.train.data.packing import PackedDataset, PackedRow, Packing, pack
from seer_jax.train.data.sources import SourceConfig
from seer_jax.train.data.tokens import ModelTokenizer, Tokenizer, load_tokens


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Training text and how it fills rows.

    Attributes:
      packing: see `Packing`.
      min_length: BEST_FIT drops shorter sequences, tokens; None: two blocks.
      chat_template: Jinja text, or the file of it, that renders chats; None: the model's own. Those of reasoning models leave out what
        stands before </think>.
    """

    packing: Packing = Packing.CONCATENATE
    min_length: int | None = None
    chat_template: str | None = None


class Batch(NamedTuple):
    """Packed rows on the device, see `packing.PackedRow`."""

    tokens: Int[Array, "*b T"]
    segment_ids: Int[Array, "*b T"]
    positions: Int[Array, "*b T"]

    @classmethod
    def of(cls, rows: PackedRow) -> "Batch":
        """The batch of rows on the host."""
        return cls(*(jnp.asarray(x, jnp.int32) for x in rows))


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """Place of a run in its data, from which a resumed run draws the same batches.

    Attributes:
      epoch: number of complete passes over the data.
      index: number of rows drawn in the current pass.
    """

    epoch: int = 0
    index: int = 0


def load_dataset(
    config: DataConfig,
    *,
    model: str,
    vocab_size: int,
    row_length: int,
    block_size: int,
    cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> PackedDataset:
    """Reads, tokenizes and packs training text.

    Args:
      config: what to read.
      model: folder or hub id of the model whose tokenizer is used, unless `tokenizer` is given.
      vocab_size: of the model; tokens outside are refused.
      row_length: T.
      block_size: sequences start at its multiples.
      cache: folder for the tokens, see `load_tokens`.
    """
    sources = SourceConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)})
    store = load_tokens(sources, tokenizer or ModelTokenizer(model, config.chat_template), cache).check_vocabulary(
        vocab_size
    )
    return pack(store, config.packing, row_length=row_length, block_size=block_size, min_length=config.min_length)


def batches(
    dataset: PackedDataset, batch_size: int, *, seed: int, start: DataPosition = DataPosition()
) -> Iterator[tuple[PackedRow, DataPosition]]:
    """Endless batches of stacked rows and, with each, the position after it.

    Each epoch has its own order, determined by seed and epoch alone; a batch may span two epochs.

    Args:
      dataset: the rows.
      batch_size: rows per batch.
      seed: of the order.
      start: first position.
    """
    epoch, index = start.epoch, start.index
    order = _order(len(dataset), seed, epoch)
    while True:
        rows: list[PackedRow] = []
        while len(rows) < batch_size:
            if index == len(dataset):
                epoch, index = epoch + 1, 0
                order = _order(len(dataset), seed, epoch)
            rows.append(dataset[int(order[index])])
            index += 1
        yield PackedRow(*(np.stack(column) for column in zip(*rows, strict=True))), DataPosition(epoch, index)


def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)

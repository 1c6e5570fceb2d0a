"""Batches in a seeded order that can be resumed at any point."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from seer_jax.checks import check_at_least
from seer_jax.sharding.layout import Layout
from seer_jax.train.data.packing import PackedDataset, PackedRow, Packing, pack, shortest_sequence
from seer_jax.train.data.sources import SourceConfig
from seer_jax.train.data.tokens import ModelTokenizer, Tokenizer, load_tokens

_HELD_OUT = 2**32 - 1  # beside the seed, where the order of an epoch has the epoch's number


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Training text and how it fills rows.

    Attributes:
      packing: concatenate cuts rows out of one document after the other; best_fit puts whole documents into rows that have room.
      min_length: best_fit drops shorter sequences, tokens; None: two blocks.
      held_out_rows: rows that are not trained on, chosen at random; their loss is reported at each checkpoint.
      chat_template: Jinja text, or the file of it, that renders chats; None: the model's own. Those of reasoning models leave out what
        stands before </think>.
    """

    packing: Packing = Packing.CONCATENATE
    min_length: int | None = None
    chat_template: str | None = None
    held_out_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "held_out_rows")
        if self.min_length is not None:
            check_at_least(1, self, "min_length")


class Batch(NamedTuple):
    """Packed rows on the device, see `packing.PackedRow`."""

    tokens: Int[Array, "*b T"]
    segment_ids: Int[Array, "*b T"]
    positions: Int[Array, "*b T"]

    @classmethod
    def of(cls, rows: PackedRow, place: "Place | None" = None) -> "Batch":
        """The batch of rows on the host, or of those that this process has of it."""
        if place is None:
            return cls(*(jnp.asarray(x, jnp.int32) for x in rows))
        arrays = (np.asarray(x, np.int32) for x in rows)
        return cls(
            *(jax.make_array_from_process_local_data(place.sharding, x, (place.size, x.shape[1])) for x in arrays)
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the rows of batches of one size lie on a mesh.

    Attributes:
      layout: of the model.
      size: B, rows of a batch.
    """

    layout: Layout
    size: int

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.layout.mesh, PartitionSpec(self.layout.rows(self.size) or None))

    @property
    def own(self) -> list[int]:
        """The rows that the devices of this process take, which are those that it reads."""
        indices = self.sharding.addressable_devices_indices_map((self.size,)).values()
        return sorted({row for index in indices if index is not None for row in range(self.size)[index[0]]})


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
    rows: int | None = None,
    cache: Path | None = None,
    resumes: bool = False,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> PackedDataset:
    """Reads, tokenizes and packs training text.

    Args:
      config: what to read.
      model: folder or hub id of the model whose tokenizer is used, unless `tokenizer` is given.
      vocab_size: of the model; tokens outside are refused.
      row_length: T.
      block_size: sequences start at its multiples.
      rows: where `config.max_tokens` is None, no more documents are read than fill so many rows. None: all are read.
      cache, resumes, say: see `load_tokens`.
    """
    sources = SourceConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)})
    min_length = shortest_sequence(config.min_length, row_length, block_size)
    limit, enough = None, None
    if rows is not None and config.max_tokens is None:
        limit = [config.packing, rows, row_length, min_length]
        enough = _fills(rows, config.packing, row_length, min_length)
    store = load_tokens(
        sources,
        tokenizer or ModelTokenizer(model, config.chat_template),
        cache,
        enough=enough,
        limit=limit,
        resumes=resumes,
        say=say,
    ).check_vocabulary(vocab_size)
    return pack(store, config.packing, row_length=row_length, block_size=block_size, min_length=min_length)


def _fills(rows: int, packing: Packing, row_length: int, min_length: int) -> Callable[[int], bool]:
    """Whether the documents so far fill so many rows, called with the number of tokens of one after the other."""
    left = rows * row_length

    def enough(length: int) -> bool:
        nonlocal left
        rest = length % row_length  # BEST_FIT cuts long documents, and drops a short remainder
        left -= length - (rest if packing is Packing.BEST_FIT and rest < min_length else 0)
        return left <= 0

    return enough


def hold_out(dataset: PackedDataset, rows: int, *, seed: int) -> tuple[PackedDataset, PackedDataset | None]:
    """(rows to train on, rows held out), the latter chosen at random; None where `rows` is 0.

    Raises:
      ValueError: no row would be left to train on.
    """
    if not rows:
        return dataset, None
    if rows >= len(dataset):
        raise ValueError(
            f"held_out_rows must leave rows to train on; got {rows} of {len(dataset)} rows. Lower it, or give more text."
        )
    chosen = np.random.default_rng((seed, _HELD_OUT)).permutation(len(dataset))[:rows]
    return dataset.take(np.setdiff1d(np.arange(len(dataset)), chosen)), dataset.take(np.sort(chosen))


def batches(
    dataset: PackedDataset,
    batch_size: int,
    *,
    seed: int,
    start: DataPosition = DataPosition(),
    own: Sequence[int] | None = None,
) -> Iterator[tuple[PackedRow, int, DataPosition]]:
    """Endless batches: stacked rows, tokens of the whole batch, and the position after it.

    Each epoch has its own order, determined by seed and epoch alone, whatever the number of processes; a batch may span two epochs.

    Args:
      dataset: the rows.
      batch_size: rows per batch.
      seed: of the order.
      start: first position.
      own: which rows of each batch are read and stacked; None: all.
    """
    epoch, index = start.epoch, start.index
    order = _order(len(dataset), seed, epoch)
    while True:
        numbers: list[int] = []
        while len(numbers) < batch_size:
            if index == len(dataset):
                epoch, index = epoch + 1, 0
                order = _order(len(dataset), seed, epoch)
            numbers.append(int(order[index]))
            index += 1
        rows = [dataset[numbers[i]] for i in (range(batch_size) if own is None else own)]
        stacked = PackedRow(*(np.stack(column) for column in zip(*rows, strict=True)))
        yield stacked, int(dataset.row_tokens[numbers].sum()), DataPosition(epoch, index)


def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)

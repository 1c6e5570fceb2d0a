"""Documents from files, folders and Hugging Face datasets, in a fixed order."""

import dataclasses
import fnmatch
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seer_jax.settings import check_types
from seer_jax.text_files import decode_text, parse_json

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")

# A text, or the messages of a chat, which the tokenizer's chat template renders.
Document = str | list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where training text comes from.

    Attributes:
      paths: files (.txt, .md, .rst, .py: one document each; .jsonl, .parquet: one per row) and folders of them, read
        in sorted order.
      dataset: name or folder of a Hugging Face dataset, read after the paths; needs the datasets package.
      subset: configuration of that dataset.
      split: split of that dataset.
      field: column of JSONL, parquet and datasets that holds the text, or the list of messages of a chat.
      include: globs on paths relative to a folder; empty: every file of a known kind.
      exclude: globs on paths relative to a folder, which override include.
      max_tokens: stop reading after the document that reaches this many tokens (of a document of more than a million characters, after
        the part that does). None: a run reads as many as it takes, in the order of the sources; anything else reads everything.
    """

    paths: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, or None to read everything; got {self.max_tokens}.")


def read_documents(config: SourceConfig) -> Iterator[Document]:
    """All documents of the sources, lazily; empty ones are left out.

    Raises:
      ValueError: there is no source, a file is of an unknown kind, or a row lacks its field.
      FileNotFoundError: a path does not exist.
      ImportError: a source needs a package that is not installed.
    """
    for path in check_sources(config):
        yield from _read_file(path, config.field)
    if config.dataset is not None:
        yield from _read_dataset(config)


def check_sources(config: SourceConfig) -> list[Path]:
    """The files of the sources, as `list_files` has them; raises what `read_documents` does where there is no text to read."""
    if not config.paths and config.dataset is None:
        raise ValueError(
            "Training needs text; got none. Set `paths` (files or folders) or `dataset` (a Hugging Face dataset)."
        )
    return list_files(config)


def list_files(config: SourceConfig) -> list[Path]:
    """The files behind `paths`, those of a folder sorted by their path in it."""
    files = []
    for name in config.paths:
        path = Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"Training text must exist; got {name!r}, which does not. Check `paths`.")
        if path.is_file():
            files.append(_known(path))
            continue
        inside = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        chosen = [_known(path / p) for p in inside if _wanted(p, config)]
        if not chosen:
            raise ValueError(
                f"The folder {name!r} must hold a file to read, with a name that ends in "
                f"{', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)} (include={config.include}, exclude={config.exclude}); "
                f"got {len(inside)} other files."
            )
        files.extend(chosen)
    return files


def _wanted(path: str, config: SourceConfig) -> bool:
    if any(fnmatch.fnmatchcase(path, glob) for glob in config.exclude):
        return False
    if config.include:
        return any(fnmatch.fnmatchcase(path, glob) for glob in config.include)
    return path.endswith(TEXT_SUFFIXES + TABLE_SUFFIXES)


def _known(path: Path) -> Path:
    if path.suffix not in TEXT_SUFFIXES + TABLE_SUFFIXES:
        raise ValueError(
            f"The name of a text file must end in {', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}; got {path}. "
            "Rename plain text to .txt."
        )
    return path


def _read_file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        rows = _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, field)
    else:
        text = _decoded(path.read_bytes(), str(path), path)
        if text.strip():
            yield text
        return
    for place, row in rows:
        yield from _document(row, field, place)


def _decoded(data: bytes, place: str, path: Path) -> str:
    try:
        return decode_text(data, place, name=str(path))
    except ValueError as error:
        raise ValueError(f"{error} To train without it, name it in `exclude`.") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decoded(line, f"{path}:{number}", path)
            if not text.strip():
                continue
            yield f"{path}:{number}", parse_json(text, f"{path}:{number}, a line of a JSONL file,")


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    parquet = _import("pyarrow.parquet", "parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                yield str(path), dict.fromkeys(names)  # refused by `_document`, which lists the columns
                return
            rows = (row for batch in file.iter_batches(columns=[field]) for row in batch.to_pylist())
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (ValueError, OSError) as error:  # of pyarrow; the readers of the rows are outside
        raise ValueError(
            f"{path} must be a parquet file; {str(error).rstrip('.')}. Download or write it again."
        ) from error


def _read_dataset(config: SourceConfig) -> Iterator[Document]:
    datasets = _import("datasets", "Hugging Face datasets")
    assert config.dataset is not None
    folder = Path(config.dataset)
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # as written by save_to_disk
        rows = datasets.load_from_disk(config.dataset)
        rows = rows[config.split] if (folder / "dataset_dict.json").exists() else rows
    else:
        rows = datasets.load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
    for row in rows:
        yield from _document(row, config.field, f"dataset {config.dataset}")


def _document(row: Any, field: str, place: str) -> Iterator[Document]:
    if not isinstance(row, Mapping) or field not in row:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{place}: each row must have the field {field!r}; got {got}. Set `field` to another name.")
    value = row[field]
    if not (isinstance(value, str) or _is_chat(value)):
        raise ValueError(
            f"{place}: the field {field!r} must hold a text or a list of chat messages with `role` and `content`; got {_described(value)}."
        )
    if (
        isinstance(value, str)
        and not value.isascii()
        and (bad := next((c for c in value if "\ud800" <= c <= "\udfff"), None))
    ):
        raise ValueError(
            f"{place}: the field {field!r} must hold valid Unicode; got the lone surrogate {bad!a}. Remove it."
        )
    if value.strip() if isinstance(value, str) else value:
        yield value


def _is_chat(value: Any) -> bool:
    """Whether each message has a role and something besides it, such as its content or its tool calls."""
    return isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m and len(m) > 1 for m in value)


def _described(value: Any) -> str:
    if isinstance(value, bytes):
        return "bytes (cast the column to text)"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return f"a list whose messages have {', '.join(map(str, value[0]))}"
    return type(value).__name__


def _import(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(
            f"Reading {purpose} needs the package {package}; it is not installed. Run pip install {package}."
        ) from error

"""Outputs: places checked before the work whose results they take, and files written whole or not at all."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLOT_FORMATS = (".png", ".pdf", ".svg")
PAGE_FORMAT = ".html"

PARTIAL = ".partial"  # behind the name of a file until it is whole, beside others of its folder
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output_file(path: Path, *, setting: str = "output") -> None:
    """Checks, before hours of work, that a file can be written. Nothing is left behind; missing folders are made by the writer.

    Args:
      path: of the file, there or not.
      setting: name of the option or argument, for messages.

    Raises:
      IsADirectoryError, NotADirectoryError, PermissionError, OSError: it can't be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{setting} must be a file; got the folder {path}. Name a file in it.")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{setting} must be a writable file; got {path}, which is not. Choose another place.")
        if not path.is_file():  # a device or a pipe, which is written in place
            return
    _check_folder(path.parent, path, setting)


def check_output_folder(path: Path, *, setting: str = "output") -> None:
    """Checks, before hours of work, that files can be written into a folder, there or not. See `check_output_file`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{setting} must be a folder; got the file {path}. Choose another place.")
    _check_folder(path, path, setting)


def _check_folder(folder: Path, path: Path, setting: str) -> None:
    """Tries to write a file into the folder, or where its first missing parent would be made."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{setting} must lie in a folder; got {path}, and {there} is a file. Choose another place."
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        kind = PermissionError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else OSError
        raise kind(
            f"{setting} must be writable; got {path}, and no file can be made in {there} ({error.strerror}). "
            "Choose another place."
        ) from error


def check_matplotlib() -> None:
    """Raises ImportError with advice where matplotlib, which plots need, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Plots need the package matplotlib; it is not installed. Run pip install matplotlib."
        ) from error


def check_plot_file(path: Path, *, setting: str = "plot", pages: bool = False) -> None:
    """Checks, before hours of work, that a plot can be drawn and written.

    Args:
      path: of the file.
      setting: name of the option or argument, for messages.
      pages: whether it may be an HTML page too, for which matplotlib is not needed.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the name does not end in .png, .pdf or .svg, or .html for a page.
      OSError: see `check_output_file`.
    """
    formats = (*PLOT_FORMATS, PAGE_FORMAT) if pages else PLOT_FORMATS
    if Path(path).suffix not in formats:
        raise ValueError(f"{setting} must be a file whose name ends in {', '.join(formats)}; got {path}.")
    if Path(path).suffix != PAGE_FORMAT:
        check_matplotlib()
    check_output_file(path, setting=setting)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Makes errors of writing name the file: Python's own of a full disk names none, or the file that was copied.

    Args:
      path: what is written.

    Raises:
      OSError: with the file, the cause and a remedy, in place of one without a name or of a full disk.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or (str(error) if "requested and" in str(error) else "")  # NumPy counts items
        if not cause or (error.filename is not None and error.errno not in _FULL):
            raise
        raise OSError(not_written(path, cause)) from error


def not_written(path: Path, cause: str) -> str:
    """The line for a file that can't be written, by the name that it gets when it is whole."""
    name = str(path).removesuffix(PARTIAL)
    return f"{name} must be written whole; got {cause!r}. Make room there (disk, quota, ulimit -f), or choose another place."


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one step, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one step, so that readers and interrupted writers find the old or the new file, whole.

    Missing folders are made. Devices and pipes are written in place.

    Raises:
      OSError: it can't be written; the old file is left.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        with naming_file(path):
            path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_file(path), new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON in one step, see `write_text`. NaN and infinity, which JSON does not have, must be None already."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

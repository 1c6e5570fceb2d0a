"""Files of one folder that belong together, written so that no reader meets a mix of old and new ones."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from seer_jax.outputs import PARTIAL, naming_file


class Replacement:
    """New files of a folder under temporary names, until `commit` puts them in place of the old ones.

    Attributes:
      folder: where the files are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._partial: dict[str, Path] = {}
        self._obsolete: list[Path] = []

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        path = self._partial[name] = self.folder / (name + PARTIAL)
        path.unlink(missing_ok=True)  # of a process that was killed
        return path

    def partial(self, name: str) -> Path:
        """Where the new file `name` is until then."""
        return self._partial[name]

    @property
    def last(self) -> Path:
        """The file that was begun last; the folder before the first one."""
        return self.folder / next(reversed(self._partial), "")

    def rename(self, old: str, new: str) -> None:
        """Changes what a new file will be called."""
        self._partial[new] = self._partial.pop(old)

    def remove(self, *paths: Path) -> None:
        """Names old files to remove when the new ones take their place."""
        self._obsolete.extend(paths)

    def flush(self) -> None:
        """Waits until the new files are on disk."""
        for path in self._partial.values():
            _flush(path)

    def commit(self, key: str) -> None:
        """Removes the old file `key`, moves the new ones, which are flushed, into place, and `key` last."""
        for path in (self.folder / key, *self._obsolete):
            if path.exists():
                os.unlink(path)
        for name in sorted(self._partial, key=lambda name: name == key):
            os.replace(self._partial[name], self.folder / name)
        _flush(self.folder)

    def discard(self) -> None:
        """Removes the new files."""
        for path in self._partial.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_files(folder: Path, key: str = "config.json") -> Iterator[Replacement]:
    """Writes several files of a folder as one step.

    A process that is killed at any moment leaves all old files, or all new ones, or a folder without the file `key`, which loading
    refuses. An error inside the block leaves the old files.

    Args:
      folder: created if it does not exist.
      key: the file without which the others are not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replacement = Replacement(folder)
    try:
        with _naming(replacement):
            yield replacement
            replacement.flush()
    except BaseException:
        replacement.discard()
        raise
    replacement.commit(key)


@contextlib.contextmanager
def _naming(files: Replacement) -> Iterator[None]:
    """Errors of writing name the file that came last."""
    try:
        yield
    except OSError:
        with naming_file(files.last):
            raise


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk: a rename may otherwise get there before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

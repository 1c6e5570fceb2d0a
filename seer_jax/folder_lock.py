"""The lock by which a folder belongs to one run at a time."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LOCK = "run.lock"


@contextlib.contextmanager
def locked(folder: Path | None, *, setting: str = "output") -> Iterator[None]:
    """Keeps other runs out of a folder; the operating system ends the lock with the process, however that ends.

    File systems without locks, and Windows, are not guarded.

    Args:
      folder: created if it does not exist; None: there is nothing to guard.
      setting: name of the option or argument, for messages.

    Raises:
      BlockingIOError: another run holds the folder.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BlockingIOError(
                    f"A folder must belong to one run at a time; {file.read().strip() or 'another process'} is using {folder}. "
                    f"Wait for its end, or give another `{setting}`."
                ) from None
            except OSError:
                pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield

"""Checkpoints of a run by Orbax: trained weights, optimizer, step and position in the data."""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from seer_jax.outputs import write_text
from seer_jax.sharding.processes import exchange, first_alone, is_first
from seer_jax.train.data.batches import DataPosition
from seer_jax.train.step import Weights

CHECKSUMS = "checksums.json"
_INCOMPLETE = "*.orbax-checkpoint-tmp"  # folders of checkpoints that Orbax has not finished
_SECONDS_TO_END = 5.0  # for Orbax's threads after one of them has failed
_SLACK = 1 << 16  # bytes of a checkpoint beside its arrays
_REFUSED = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
# What libraries that write files say of it; they raise errors of their own kinds.
_FULL = re.compile(r"No space left|File too large|quota exceeded")
_NOT_WRITTEN = re.compile(
    rf"Error (?:writing|opening|creating|calling)|{_FULL.pattern}"
)  # TensorStore's, which follow from it too


@dataclasses.dataclass(frozen=True)
class RunState:
    """State from which a run resumes.

    Attributes:
      step: number of optimizer steps done.
      trained: the trained weights.
      optimizer: state of the optimizer.
      position: in the data, after the last batch.
      tokens: number of tokens trained on so far.
    """

    step: int
    trained: Weights
    optimizer: Any
    position: DataPosition
    tokens: int


class Checkpoints:
    """The checkpoints in one folder.

    An incomplete one, of a run that was killed while writing, is ignored and removed. A damaged one, whose files differ from their
    checksums or cannot be read, is passed over for the one before; once that one is restored, it is moved to `damaged_checkpoints`
    beside the folder.

    Attributes:
      folder: where they are.
      step: of the newest checkpoint that is not damaged; None where there is none at all.
      settings: of the run that made it.
    """

    def __init__(self, folder: Path, *, keep: int, say: Callable[[str], None]):
        """
        Args:
          folder: created if it does not exist.
          keep: number of checkpoints to keep; older ones are deleted.
          say: shows a warning.

        Raises:
          ValueError: there are checkpoints, and all are damaged.
        """
        import orbax.checkpoint as ocp  # takes seconds to import

        self.folder = folder.absolute()  # Orbax accepts absolute paths only
        # Written synchronously: gates are small, and each checkpoint is complete before the next step. Incomplete ones are removed
        # by `restore`: Orbax would do it in a thread that its `close` does not wait for.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        names = ("trained", "optimizer", "run")
        try:
            self._manager = ocp.CheckpointManager(self.folder, item_names=names, options=options)
        except RecursionError as error:  # of Orbax's JSON reader; it passes over other damage in these files
            raise ValueError(
                f"The metadata of the checkpoints in {self.folder} must be JSON of a few levels; a file is damaged. Restore it from a "
                "copy, or give another `output` for a new run."
            ) from error
        self._args, self._say = ocp.args, say
        self._damaged: dict[int, str] = {}
        self.step: int | None = None
        self._run: dict[str, Any] = {}
        try:
            self._left = exchange(sorted(self._manager.all_steps()))[0]
            self._advance()
        except BaseException:
            self.close()
            raise

    @property
    def settings(self) -> dict[str, Any]:
        return self._run["settings"]

    def save(self, state: RunState, settings: dict[str, Any]) -> None:
        """Writes a checkpoint with its checksums, unless there is one of this step.

        Raises:
          OSError: it cannot be written; see `is_disk_error`.
        """
        if self._manager.latest_step() == state.step:
            return
        run = {"position": dataclasses.asdict(state.position), "tokens": state.tokens, "settings": settings}
        items = self._args.Composite(
            trained=self._args.StandardSave(state.trained),
            optimizer=self._args.StandardSave(state.optimizer),
            run=self._args.JsonSave(run),
        )
        try:
            if is_first():
                self._check_room(state)
            with _quiet():
                self._manager.save(state.step, args=items, force=True)
        except Exception as error:
            self._remove_incomplete()
            if isinstance(error, OSError) or not _NOT_WRITTEN.search(str(error)):
                raise
            raise OSError(errno.EIO, first_line(error), str(self.folder)) from error
        folder = self.folder / str(state.step)
        sums = {name: value for name, value in _checksums(folder).items() if value is not None}
        if is_first():
            with contextlib.suppress(OSError):  # the checkpoint is complete, and is read without them too
                write_text(folder / CHECKSUMS, json.dumps(sums))

    def restore(self, like: RunState) -> RunState:
        """The newest checkpoint that is not damaged, its arrays sharded as those of `like`; `like` itself where there is none.

        Raises:
          ValueError: all checkpoints are damaged.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (like.trained, like.optimizer)
        )
        args = self._args.Composite(
            trained=self._args.StandardRestore(abstract[0]), optimizer=self._args.StandardRestore(abstract[1])
        )
        with first_alone():
            self._remove_incomplete()
        while self.step is not None:
            items, damage = {}, None
            try:
                items = self._manager.restore(self.step, args=args)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax raises errors of many kinds; each means that this one cannot be read
                damage = first_line(error)
            damage = _agreed(damage)
            if damage is not None:
                self._damaged[self.step] = damage
                self._advance()
                continue
            self._set_aside()
            position = DataPosition(**self._run["position"])
            return RunState(self.step, items["trained"], items["optimizer"], position, self._run["tokens"])
        return like

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def _check_room(self, state: RunState) -> None:
        """Raises OSError before Orbax begins what cannot end: its threads go on for a while after the first of them has failed."""
        needed = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.optimizer)))
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < needed + _SLACK:  # some network folders have no size
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

    def _remove_incomplete(self) -> None:
        for place in self.folder.glob(_INCOMPLETE) if is_first() else ():
            shutil.rmtree(place, ignore_errors=True)

    def _set_aside(self) -> None:
        """Moves the damaged checkpoints away, so that the run can write those steps again."""
        with first_alone():
            for step in self._damaged if is_first() else ():
                self._move_away(step)
        if self._damaged:
            self._manager.reload()
            self._damaged = {}

    def _move_away(self, step: int) -> None:
        place = self.folder.parent / "damaged_checkpoints" / str(step)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(place)

    def _advance(self) -> None:
        """Finds the next older checkpoint that is not damaged."""
        self.step = None
        while self._left and self.step is None:
            step = self._left.pop()
            damage = self._examine(step)
            if damage is None:
                self.step = step
            else:
                self._damaged[step] = damage
        if not self._damaged:
            return
        newest = max(self._damaged)
        if self.step is None:
            raise ValueError(
                f"A checkpoint in {self.folder} must be readable; all are damaged: {self._damaged[newest]}. Restore them from a copy, "
                "or give another `output` for a new run."
            )
        self._say(
            f"The checkpoint of step {newest} is damaged ({self._damaged[newest]}); going on from that of step {self.step}."
        )

    def _examine(self, step: int) -> str | None:
        """Reads what a checkpoint says of its run; returns what is wrong with it, as all processes then know, if anything is."""
        return _agreed(self._examine_alone(step, _checksums(self.folder / str(step))))

    def _examine_alone(self, step: int, found: dict[str, int | None]) -> str | None:
        folder = self.folder / str(step)
        try:
            # A run that was killed between the two leaves a complete checkpoint without checksums.
            expected = json.loads((folder / CHECKSUMS).read_text()) if (folder / CHECKSUMS).exists() else {}
            if wrong := [name for name in expected if found.get(name) != expected[name]]:
                return f"{wrong[0]} {'is not what was written' if wrong[0] in found else 'is missing'}"
            run = self._manager.restore(step, args=self._args.Composite(run=self._args.JsonRestore()))["run"]
            DataPosition(**run["position"])
            if missing := {"tokens", "settings"} - set(run):
                return f"it lacks {' and '.join(sorted(missing))}"
        except Exception as error:  # as above
            return first_line(error)
        self._run = run
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging tracebacks of its threads, and waits for them: what fails in them is raised as well."""
    there, loggers = set(threading.enumerate()), [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        # TensorStore's threads print what they raise.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that are not awaited once one has failed
            try:
                yield
            except Exception:
                until = time.monotonic() + _SECONDS_TO_END
                for thread in set(threading.enumerate()) - there:
                    thread.join(max(0.0, until - time.monotonic()))
                raise
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def is_disk_error(error: Exception) -> bool:
    """Whether the disk refused a file, mostly for want of space, as the operating system or a library says it."""
    return getattr(error, "errno", None) in _REFUSED or _FULL.search(str(error)) is not None


def _agreed(damage: str | None) -> str | None:
    """What the first process that found a damage says of it."""
    return next((found for found in exchange(damage) if found is not None), None)


def _checksums(folder: Path) -> dict[str, int | None]:
    """CRC-32 of each file below a folder, None of one that cannot be read; of several processes each reads some."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    own = files[jax.process_index() :: jax.process_count()]
    found = exchange({path.relative_to(folder).as_posix(): _checksum(path) for path in own})
    return {name: value for part in found for name, value in part.items()}


def _checksum(path: Path) -> int | None:
    value = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                value = zlib.crc32(piece, value)
    except OSError:
        return None
    return value


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""A run from its first second to its last: its folder, its lock, what it says, and the one line that it ends with when it is stopped."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from seer_jax.folder_lock import locked
from seer_jax.inference.memory import FRACTION, MOST_FRACTION, USUAL_FRACTION
from seer_jax.outputs import check_output_folder, write_text
from seer_jax.sharding.processes import exchange, failure_of_another, is_first
from seer_jax.train.config import TrainConfig, renewed, to_dict
from seer_jax.train.loop.checkpoint import Checkpoints, RunState, first_line, is_disk_error
from seer_jax.train.loop.progress import ConsoleProgress, StepReport
from seer_jax.train.loop.resuming import check_resumed

ProgressFunction = Callable[[StepReport], None]


class Session:
    """What a run has beside its model and data.

    Attributes:
      config: settings of the run.
      folder: of its output; None: nothing is written.
      show: called after each step.
      say: shows a line.
      doing: what the run is at, for the line it is stopped with.
      settings: all that determines the results of the run, JSON; see `accept`.
      step: of the newest checkpoint; 0 where there is none.
      written_step: steps that the gates, the model or the adapter which this process wrote are trained; 0 before it wrote any.
    """

    def __init__(self, config: TrainConfig, show: ProgressFunction, say: Callable[[str], None]):
        self.config, self.show, self.say = config, show, say
        self.folder = None if config.output is None else Path(config.output)
        self.doing, self.step, self.written_step, self.told = "starting", 0, 0, False
        self.settings: dict[str, Any] = {}
        self._checkpoints: Checkpoints | None = None

    def begin(self, doing: str) -> None:
        """Says what the run does next."""
        self.doing = doing
        self.say(f"{doing[0].upper()}{doing[1:]} ...")

    def accept(self, **settings: Any) -> None:
        """Adds settings that determine the results of the run, and compares them with those of the run whose folder it is.

        Nothing in the folder is changed before.

        Raises:
          ValueError: the folder is another run's.
        """
        self.settings |= settings
        _check_same(settings)
        if self.folder is None:
            return
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(
                self.folder / "checkpoints", keep=self.config.keep_checkpoints, say=self.warn
            )
        if self._checkpoints.step is None:
            return
        self.step = self._checkpoints.step
        theirs = self._checkpoints.settings
        theirs = theirs | {"config": renewed(theirs.get("config", {}), type(self.config))}
        note = check_resumed(settings, theirs, step=self.step, folder=self.folder)
        if note is not None:
            self.say(note)

    def start(self, like: RunState) -> RunState:
        """The state to go on from, see `Checkpoints.restore`; records the settings in the folder."""
        if self._checkpoints is None or self.folder is None:
            return like
        state = self._checkpoints.restore(like)
        self.step = state.step
        if is_first():
            write_text(self.folder / "config.json", json.dumps(to_dict(self.config), indent=2) + "\n")
        return state

    def save(self, state: RunState) -> None:
        """Writes a checkpoint."""
        if self._checkpoints is not None:
            self._checkpoints.save(state, self.settings)
            self.step = state.step

    def warn(self, text: str) -> None:
        """Shows a line on standard error, whatever shows the progress; of several processes, the first does."""
        if is_first():
            print(text, file=sys.stderr, flush=True)

    def stopped(self, when: str) -> str:
        """What is kept of the run as it is stopped: one line, which is made once."""
        if self.told:
            return ""
        self.told = True
        return f"Stopped {when}; {self.kept()}."

    def kept(self) -> str:
        """What is kept of the run, and how it goes on."""
        if self.folder is None:
            return "without an output folder nothing is kept"
        if self.step:
            return f"the checkpoint of step {self.step} is kept; started again, the run resumes there"
        return "no checkpoint was written yet; started again, the run begins anew"

    def disk_error(self, error: Exception) -> OSError:
        """The error of a run whose folder takes no more files: what is kept, and how it goes on."""
        reason = getattr(error, "strerror", None) or first_line(error)
        kept = [f"the checkpoint of step {self.step}"] * bool(self.step)
        what, setting = self.config.results
        kept += [f"the {what} of step {self.written_step}"] * bool(self.written_step)
        if self.step:
            go_on = "and start the run again to resume there"
        elif self.written_step:
            go_on = f"and give another `output` for a new run; what is kept can be its `{setting}`"
        else:
            go_on = "and start the run again"
        return OSError(
            f"A run must be able to write its files; {self.folder} took none while {self.doing} ({reason}). "
            f"Kept: {' and '.join(kept) or 'nothing yet'}. Free space, {go_on}."
        )

    def close(self) -> None:
        """Ends the checkpoints' threads."""
        if self._checkpoints is not None:
            self._checkpoints.close()


@contextlib.contextmanager
def open_session(config: TrainConfig, progress: ProgressFunction | None) -> Iterator[Session]:
    """The session of a run, which has the output folder for itself.

    Args:
      config: settings of the run.
      progress: called after each step; None: a bar or plain lines are shown, and what the run does before its first step.

    Raises:
      BlockingIOError: another run is using the folder.
      OSError: the folder cannot be written to, or has no room for the run's files.
      MemoryError: the device has no memory for the run.
    """
    with contextlib.ExitStack() as stack:
        if config.output is not None:
            if is_first():
                check_output_folder(Path(config.output))
                stack.enter_context(locked(Path(config.output)))
            exchange(None)
            if not Path(config.output).is_dir():
                raise FileNotFoundError(
                    f"The output folder must lie where every process sees it; the first one has made {config.output}, and process "
                    f"{jax.process_index()} finds none. Give an `output` on a file system that all hosts share."
                )
        if progress is None and is_first():
            console = ConsoleProgress(interval=config.log_interval)
            stack.callback(console.close)
            session = Session(config, console, console.note)
        else:
            session = Session(config, progress or _silent, _silent)
        stack.callback(session.close)
        try:
            yield session
        except KeyboardInterrupt as stop:
            if line := session.stopped(f"while {session.doing}"):
                stop.add_note(line)
            raise
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise out_of_memory(config, f"ran out while {session.doing}") from error
            if jax.process_count() == 1:
                raise
            lost = failure_of_another() or f"process {jax.process_index()} lost another one ({first_line(error)})"
            raise ConnectionError(
                f"The processes of a run must all stay alive; while {session.doing}, {lost}; {session.kept()}. Start all of them again."
            ) from error
        except Exception as error:  # libraries that write files raise errors of their own kinds
            if session.folder is None or not is_disk_error(error):
                raise
            raise session.disk_error(error) from error


def out_of_memory(config: TrainConfig, what: str) -> MemoryError:
    """The error of a run that does not fit, with its remedies."""
    smaller = "" if config.micro_batch_size == 1 else f"micro_batch_size (now {config.micro_batch_size}) or "
    return MemoryError(
        f"Training must fit in device memory; it {what}. Lower {smaller}sequence_length (now {config.sequence_length}); on a GPU, "
        f"{FRACTION}={MOST_FRACTION} lets JAX take more than its usual {USUAL_FRACTION:.0%} of the memory."
    )


def _check_same(settings: dict[str, Any]) -> None:
    """Raises ValueError where other processes of the run have other settings."""
    own, others = json.loads(json.dumps(settings)), exchange(settings)
    for number, theirs in enumerate(others):
        if differing := [
            f"{name}.{key}"
            for name in own
            for key in _keys(own[name])
            if _keys(own[name])[key] != _keys(theirs[name]).get(key)
        ]:
            raise ValueError(
                f"All processes of a run must have the same settings and data; process {number} has another {', '.join(differing)} than process "
                f"{jax.process_index()}. Start all with one command, and with files that all hosts share."
            )


def _keys(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}


def _silent(shown: object) -> None:
    """Shows nothing: the caller's own progress function takes reports of steps alone, and of several processes the first one speaks."""

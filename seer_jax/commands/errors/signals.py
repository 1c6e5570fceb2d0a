"""Ctrl-C and SIGTERM: they end the program at once while modules are imported, and are raised as exceptions from then on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from seer_jax.commands import ExitCode


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: what a command does about Ctrl-C, such as saying what is kept, it does about this too."""


# By the number of a signal: the handler of a process that has decided nothing, the exit code, and the word for it.
_SIGNALS: dict[int, tuple[Any, ExitCode, str]] = {
    signal.SIGINT: (signal.default_int_handler, ExitCode.INTERRUPTED, "interrupted"),
    signal.SIGTERM: (signal.SIG_DFL, ExitCode.TERMINATED, "terminated"),
}


@contextlib.contextmanager
def handled_signals(line: Callable[[str], str]) -> Iterator[Callable[[], None]]:
    """Handles both signals, unless the caller of the process has decided otherwise.

    At first either ends the process at once, after one line: there is nothing to keep yet, and modules that are being imported may lose
    what a handler raises.

    Args:
      line: makes the line of a word, "interrupted" or "terminated".

    Yields:
      A function to call when all is imported: from then on Ctrl-C raises KeyboardInterrupt, SIGTERM `Terminated`.
    """

    def leave(number: int, frame: Any) -> NoReturn:
        _, code, word = _SIGNALS[number]
        os.write(2, f"{after_echo()}{line(word)}\n".encode())  # not `print`, which may have been interrupted itself
        os._exit(code)

    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    # Python allows handlers in the main thread alone.
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, (usual, *_) in _SIGNALS.items() if in_main and signal.getsignal(number) == usual]
    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    _handle(ours, dict.fromkeys(ours, leave))
    try:
        yield lambda: _handle(ours, raising)
    finally:
        _handle(ours, {number: usual for number, (usual, *_) in _SIGNALS.items()})


def _handle(numbers: Iterable[int], handlers: Mapping[int, Any]) -> None:
    for number in numbers:
        signal.signal(number, handlers[number])


def after_echo() -> str:
    """What comes before a line behind the ^C that a terminal shows."""
    return "\n" if sys.stderr.isatty() else ""


def ending(stop: KeyboardInterrupt) -> tuple[ExitCode, str]:
    """Exit code and line of a command that was stopped; what it keeps stands in the notes of the exception."""
    _, code, word = _SIGNALS[signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT]
    return code, " ".join([f"{word}.", *getattr(stop, "__notes__", ())])

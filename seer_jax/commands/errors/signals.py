"""Ctrl-C and SIGTERM: they end the program at once while modules are imported, and are raised as exceptions from then on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from seer_jax.commands import ExitCode

AGAIN = 1.0  # seconds after which an exception that was lost is raised again


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: what a command does about Ctrl-C, such as saying what is kept, it does about this too."""

    code = ExitCode.TERMINATED


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

    # Python allows handlers in the main thread alone.
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, (usual, *_) in _SIGNALS.items() if in_main and signal.getsignal(number) == usual]
    with _Raised() as raised:
        _handle(ours, dict.fromkeys(ours, leave))
        try:
            yield lambda: _handle(ours, dict.fromkeys(ours, raised))
        finally:
            _handle(ours, {number: usual for number, (usual, *_) in _SIGNALS.items()})


class _Raised:
    """A handler that raises what a signal means, and raises it again until it has arrived: code that calls Python from C++, finalisers and
    callbacks of the garbage collector lose it."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._again = False

    def __enter__(self) -> "_Raised":
        self._hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: None if issubclass(lost.exc_type, KeyboardInterrupt) else self._hook(lost)
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        if self._timer is not None:
            self._timer.cancel()

    def __call__(self, number: int, frame: Any) -> None:
        again, self._again = self._again, False
        self._timer = threading.Timer(AGAIN, self._repeat, [number])
        self._timer.daemon = True
        self._timer.start()
        if again and isinstance(sys.exception(), KeyboardInterrupt):
            return  # it is on its way
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def _repeat(self, number: int) -> None:
        self._again = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


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


def end_process(code: int) -> None:
    """Ends the process of a command that was stopped; not one of several, which leave together as Python ends.

    Python's end would wait for all that XLA still computes, which can be minutes of it, or be aborted by it.
    """
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller, as `>&-` does
        with contextlib.suppress(OSError):  # the reader has closed it
            stream.flush()
    os._exit(code)

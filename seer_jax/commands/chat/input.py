"""Messages of standard input, and signals that stop an answer and not the chat."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from seer_jax.commands.errors.signals import Terminated


class Stops:
    """While an answer is made, Ctrl-C and SIGTERM wait for the step to end, and stop the answer; a second one is handled as ever.

    Attributes:
      came: the number of the signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._before: dict[int, Callable[..., Any]] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(usual := signal.getsignal(number)):
                    self._before[number] = usual
                    signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, usual in self._before.items():
            signal.signal(number, usual)

    def _stop(self, number: int, frame: Any) -> None:
        if self.came is not None:
            self._before[number](number, frame)
        self.came = number


def messages() -> Iterator[str]:
    """The messages on standard input; on a terminal they are asked for."""
    lines = _asked() if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin)
    parts: list[str] = []
    for line in lines:
        if line is None:
            parts = []
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


def _asked() -> Iterator[str | None]:
    """Lines that are typed, until Ctrl-D; None where Ctrl-C discards a message."""
    import readline  # noqa: F401 (input() edits lines with it)

    while True:
        usual = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # that of the program would raise a second time
        line = None
        try:
            line = input("> ")
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            print("\n(Ctrl-D ends the chat.)", file=sys.stderr)
        except EOFError:
            print()
            return
        finally:
            signal.signal(signal.SIGINT, usual)
        yield line

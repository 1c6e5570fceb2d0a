"""A clean stop of a run on SIGINT and SIGTERM, of one process or of all."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import jax

from seer_jax.sharding.processes import agree_to_end
from seer_jax.train.loop.session import Session


class StopSignals:
    """Defers SIGINT and SIGTERM until the end of a step; a second signal acts at once.

    Attributes:
      signal: the first signal that this process has got.
      asked: the signal by which the run ends; of several processes, any may have got it.
    """

    def __init__(self, session: Session) -> None:
        self.signal: int | None = None
        self.asked: int | None = None
        self._acted: int | None = None
        self._session, self._waits = session, True
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a first signal act at once meanwhile."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True
        if self._acted is not None:  # code that calls Python from C++ may drop what a handler raises
            signal.raise_signal(self._acted)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and self._waits:
            self.signal = number
            if jax.process_count() == 1:
                self.asked = number
            # Not `print`: the signal may have come while something was printed, which allows no second call.
            os.write(2, b"Stopping when the steps that are under way have ended; a second signal stops at once.\n")
            return
        self.__exit__()
        self._acted = number
        # The process then ends without an exception.
        if number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL:
            self._session.warn(self._session.stopped(f"while {self._session.doing}"))
        signal.raise_signal(number)

    def leave(self, step: int) -> NoReturn:
        """Ends the run as the signal would have, in all processes."""
        agree_to_end()
        line = self._session.stopped(f"after step {step}")
        if self.asked == signal.SIGINT:
            stop = KeyboardInterrupt()
            stop.add_note(line)
            raise stop
        self._session.warn(line)
        raise SystemExit(128 + (self.asked or 0))

"""Progress of a job with several stages: a bar on a terminal, plain lines elsewhere, and the duration of each stage."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_INTERVAL = 10.0  # seconds from one plain line to the next

Advance = Callable[[str], None]


class Stages:
    """Runs stages one after the other.

    Attributes:
      seconds: duration of each finished stage, by its title.
    """

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, title: str, steps: int = 1) -> Iterator[Advance]:
        """Shows a stage while it runs; the caller calls what it yields after each step, with a word on the progress."""
        started = time.monotonic()
        with self._bar(title, steps) if self.console.is_terminal else self._lines(title, steps) as advance:
            yield advance
        self.seconds[title] = time.monotonic() - started
        self.say(f"{title}: {self.seconds[title]:.1f} s")

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _bar(self, title: str, steps: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[word]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=steps, word="")
            yield lambda word: progress.update(task, advance=1, word=word)

    @contextlib.contextmanager
    def _lines(self, title: str, steps: int) -> Iterator[Advance]:
        done, last = 0, time.monotonic()

        def advance(word: str) -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last >= LINE_INTERVAL:
                last = time.monotonic()
                self.say(f"{title}: {done}/{steps}  {word}")

        yield advance

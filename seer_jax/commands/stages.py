"""Progress of a job with several stages: a bar on a terminal, plain lines elsewhere, and the duration of each stage."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

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
    def stage(self, title: str, steps: int = 1, *, every_step: bool = False) -> Iterator[Advance]:
        """Shows a stage while it runs, with the time that is left; the caller calls what it yields after each step, with a word on it.

        Args:
          title: of the stage.
          steps: number of steps.
          every_step: print a line for each step, above the bar on a terminal; otherwise plain lines come at intervals.
        """
        clock = StepClock(steps)
        shown = self._bar if self.console.is_terminal else self._lines
        with shown(title, clock, every_step) as advance:
            yield advance
        self.seconds[title] = clock.elapsed
        self.say(f"{title}: {self.seconds[title]:.1f} s")

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _bar(self, title: str, clock: "StepClock", every_step: bool) -> Iterator[Advance]:
        # The bar takes the room that is left of a line; the word has a line of its own.
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        progress, line = Progress(*columns, expand=True), Text(no_wrap=True, overflow="ellipsis")
        task = progress.add_task(title, total=clock.steps, left="")

        def advance(word: str) -> None:
            clock.step()
            progress.update(task, advance=1, left=clock.left)
            if every_step:
                self.say(word)
            else:
                line.plain = word

        with Live(Group(progress, line), console=self.console, transient=True):
            yield advance

    @contextlib.contextmanager
    def _lines(self, title: str, clock: "StepClock", every_step: bool) -> Iterator[Advance]:
        last = time.monotonic()

        def advance(word: str) -> None:
            nonlocal last
            clock.step()
            if every_step or time.monotonic() - last >= LINE_INTERVAL:
                last = time.monotonic()
                left = f" ({clock.left})" if clock.left else ""
                self.say(f"{title}: {clock.done}/{clock.steps}{left}  {word}")

        yield advance


class StepClock:
    """Counts the steps of a stage and estimates how long the others take.

    Attributes:
      steps: of the whole stage.
      done: that are over.
    """

    def __init__(self, steps: int, now: Callable[[], float] = time.monotonic):
        self.steps, self.done = steps, 0
        self._now, self._started = now, now()

    def step(self) -> None:
        """One more is over."""
        self.done += 1

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started

    @property
    def left(self) -> str:
        """About how long the other steps take, if they take as long as those before; "" where there are none on either side."""
        if not self.done or self.done >= self.steps:
            return ""
        return f"about {write_duration(self.elapsed / self.done * (self.steps - self.done))} left"


def write_duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> write_duration(59.4), write_duration(61), write_duration(7320)
    ('59 s', '1 min 1 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"

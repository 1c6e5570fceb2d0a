"""Display of a run's progress: a bar on a terminal, plain lines elsewhere."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step.

    Attributes:
      step: its number, from 1.
      steps: number of steps in the run.
      metrics: loss and further metrics of the task.
      tokens_per_second: mean over the last steps.
      seconds_left: at that speed.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    tokens_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        parts = [f"step {self.step}/{self.steps}", self.summary]
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return "  ".join([*parts, f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"])

    @property
    def summary(self) -> str:
        """Loss, block recall and speed in one line."""
        parts = [f"loss {self.metrics['loss']:.4f}"]
        for kind in ("prefill", "decode"):
            if f"{kind}_recall" in self.metrics:
                parts.append(f"{kind} recall {self.metrics[f'{kind}_recall']:.3f}")
        return "  ".join([*parts, f"{self.tokens_per_second:,.0f} tokens/s"])


class ConsoleProgress:
    """Shows each `StepReport` that it is called with."""

    def __init__(self, *, interval: int, console: Console | None = None):
        """
        Args:
          interval: steps from one plain line to the next.
          console: where to show it; None: standard output.
        """
        self._console, self._interval = console or Console(), interval
        self._bar: Progress | None = None
        self._task: Any = None

    def __call__(self, report: StepReport) -> None:
        """Shows a step."""
        if not self._console.is_terminal:
            if report.step % self._interval == 0 or report.step == report.steps:
                self.note(str(report))
            return
        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=report.steps)
            self._bar.start()
        self._bar.update(self._task, completed=report.step, description=report.summary)

    def note(self, text: str) -> None:
        """Shows a line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()

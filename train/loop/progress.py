"""Display of a run's progress: a bar on a terminal, plain lines elsewhere."""

import dataclasses
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step.

    Attributes:
      step: its number, from 1.
      steps: number of steps in the run.
      metrics: loss and further metrics of the task.
      tokens_per_second: mean over the last steps.
      seconds_left: at that speed.
      epoch: passes over the data so far.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    tokens_per_second: float
    seconds_left: float
    epoch: float = 0.0

    def __str__(self) -> str:
        return "  ".join([f"step {self.step}/{self.steps}", self.summary, f"epoch {self.epoch:.2f}", self.time_left])

    @property
    def time_left(self) -> str:
        """Hours, minutes and seconds."""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    @property
    def summary(self) -> str:
        """Loss, block recall and speed in one line."""
        parts = [f"loss {self.metrics['loss']:.4f}"]
        if "held_out_loss" in self.metrics:
            parts.append(f"held-out loss {self.metrics['held_out_loss']:.4f}")
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
        self._live: Live | None = None
        self._line = Text(overflow="fold")
        self._task: Any = None

    def __call__(self, report: StepReport) -> None:
        """Shows a step."""
        held_out = "held_out_loss" in report.metrics
        if not self._console.is_terminal:
            if report.step % self._interval == 0 or report.step == report.steps or held_out:
                self.note(str(report))
            return
        if held_out:
            self.note(str(report))
        if self._bar is None:
            # The bar takes the room that is left of a line; the metrics have lines of their own.
            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("epoch {task.fields[epoch]:.2f}"),
                TimeRemainingColumn(),
            )
            bar = Progress(*columns, console=self._console, expand=True)
            self._task = bar.add_task("", total=report.steps, epoch=0.0)
            self._live = Live(Group(bar, self._line), console=self._console, transient=False)
            self._bar = bar
            self._live.start()
        self._bar.update(self._task, completed=report.step, epoch=report.epoch)
        self._line.plain = report.summary

    def note(self, text: str) -> None:
        """Shows a line of its own."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._live is not None:
            self._live.stop()

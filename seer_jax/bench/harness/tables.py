"""Measurements as tables on a terminal."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from seer_jax.bench.harness.measurement import Measurement, hardware


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: its head; the line break is kept.
      result: name of the result that it shows.
      form: how a number is written.
      meaning: one line for the legend.
    """

    title: str
    result: str
    form: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of measurements.

    Attributes:
      name: as measurements name it.
      title: above it.
      columns: from left to right, after the case.
    """

    name: str
    title: str
    columns: tuple[Column, ...]


MILLISECONDS = Column("ms", "milliseconds", ".4g", "milliseconds of one call, median of 5 runs")
DENSITY = Column("kept", "density", ".1%", "share of the causal map's blocks that are kept, measured")
LISTED = Column("kept", "density", ".1%", "share of a sequence's blocks that are listed, measured")
ERRORS = (
    Column("error", "error", ".1e", "of the output against float32 on sampled rows, relative"),
    Column("plain\nerror", "plain_error", ".1e", "the same of plain attention in the same number format"),
    Column("lse\nerror", "lse_error", ".1e", "largest difference of the log of the softmax's sum on those rows"),
)
DENSE = Column("dense\nms", "dense_milliseconds", ".4g", "dense attention of the same shape (cuDNN on a GPU)")
SPEEDUP = Column("times\nfaster", "speedup", ".2f", "dense attention's (the dense layer's, model's) ms over ms")
PROGRAM = (
    Column("compile\ns", "compile_seconds", ".1f", "tracing and compiling"),
    Column("peak\nGiB", "peak_gib", ".1f", "most memory in use on the device, weights and cache included"),
    Column("planned\nGiB", "planned_gib", ".1f", "what the compiler lays out for a run"),
)
FLOOR = (
    Column("floor\nms", "floor_milliseconds", ".4g", "time in which the device's memory moves what must be read"),
    Column("times\nfloor", "times_floor", ".2f", "ms over floor ms"),
)
MEMORY = Column("memory\nTB/s", "memory_terabytes", ".3g", "rate of that memory, of a large sum or copy")


def print_tables(console: Console, tables: Sequence[Table], measurements: Sequence[Measurement]) -> None:
    """Prints what it ran on, the tables that have measurements, and what each column means in one line."""
    machine, shown = hardware(), {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"\n{machine['device']} ({versions})", highlight=False, soft_wrap=True)
    for table in tables:
        lines = [m for m in measurements if m.table == table.name]
        if lines:
            console.print()
            console.print(_drawn(table, lines))
            shown |= {" ".join(column.title.split()): column.meaning for column in table.columns}
    console.print()
    for word, meaning in shown.items():
        console.print(f"[bold]{word}[/bold]: {meaning}", highlight=False, soft_wrap=True)
    for note in dict.fromkeys(m.note for m in measurements if m.note):
        console.print(f"-: {note}", highlight=False, soft_wrap=True)


def progress_line(m: Measurement) -> str:
    """A measurement as it comes in."""
    time = m.results.get("milliseconds")
    outcome = f"[bold red]{m.failure}[/bold red]" if m.failure else f"{_written(time, '.4g')} ms"
    return f"{m.table}: {_name(m)}: {outcome}" + (f" ({m.note})" if m.note else "")


def _drawn(table: Table, measurements: Sequence[Measurement]) -> RichTable:
    """One line per measurement; "-" where a quantity does not apply."""
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1),
    )
    drawn.add_column("", no_wrap=True)
    for column in table.columns:
        drawn.add_column(column.title, justify="right", no_wrap=True)
    for m in measurements:
        values = [_written(m.results.get(column.result), column.form) for column in table.columns]
        drawn.add_row(_name(m) + (" [bold red]WRONG[/bold red]" if m.failure else ""), *values)
    return drawn


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _name(m: Measurement) -> str:
    config = m.settings.get("config")
    return m.case if config is None else f"{m.case}, {config}"

"""Where measurements go as they come: tables on a terminal, a file, a plot."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from seer_jax.bench.configs import BenchConfig
from seer_jax.bench.harness.measurement import Measurement, hardware, write_json
from seer_jax.bench.harness.plots import Panel, plot_panels
from seer_jax.outputs import check_output_file, check_plot_file


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
    """A table of measurements: the name that they have, what stands above it, and its columns after the case."""

    name: str
    title: str
    columns: tuple[Column, ...]


MILLISECONDS = Column("ms", "milliseconds", ".4g", "milliseconds of one call, median of 5 runs, 3 above a second")
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


def report(
    config: BenchConfig, measurements: Iterable[Measurement], tables: Sequence[Table], panels: Sequence[Panel]
) -> list[Measurement]:
    """Prints a line for each measurement, then the tables; writes the file and draws the plot if they are asked for.

    Raises:
      ImportError, OSError, ValueError: before anything is measured: a plot is asked for and matplotlib is not installed, or a file
        can't be written. At the end: no measurement can be drawn.
    """
    if config.plot is not None:
        check_plot_file(config.plot)
    if config.output is not None:
        check_output_file(config.output)
    console, done = Console(), []
    if not console.is_terminal:
        console = Console(width=130)  # of a file; the tables are made for a wide terminal

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    try:
        for m in measurements:
            done.append(m)
            outcome = f"[bold red]{escape(m.failure)}[/bold red]" if m.failure else f"{_written(m, MILLISECONDS)} ms"
            note = f" ({escape(m.note)})" if m.note else ""
            say(f"{m.table}: {escape(_name(m))}: {outcome}{note}")
            if config.output is not None:  # after each one, so that an interrupted run leaves what it has
                write_json(config.output, done, command=sys.argv)
    except KeyboardInterrupt as stop:
        print_tables(console, tables, done)
        kept = "shown above" if config.output is None else f"kept in {config.output}"
        stop.add_note(f"{len(done)} measurements are {kept}.")
        raise
    print_tables(console, tables, done)
    if config.output is not None:
        say(escape(f"Written: {config.output}"))
    if config.plot is not None:
        plot_panels(config.plot, panels, done)
        say(escape(f"Drawn: {config.plot}"))
    return done


def print_tables(console: Console, tables: Sequence[Table], measurements: Sequence[Measurement]) -> None:
    """Prints what it ran on, the tables that have measurements, and what each column means in one line."""
    machine, shown = hardware(), {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"\n{machine['device']} ({versions})", highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        if lines := [m for m in measurements if m.table == table.name]:
            console.print()
            console.print(_drawn(table, lines))
            shown |= {" ".join(column.title.split()): column.meaning for column in table.columns}
    console.print()
    legend = [f"[bold]{escape(word)}[/bold]: {escape(meaning)}" for word, meaning in shown.items()]
    for line in (*legend, *dict.fromkeys(escape(f"-: {m.note}") for m in measurements if m.note)):
        console.print(line, highlight=False, soft_wrap=True)


def _drawn(table: Table, measurements: Sequence[Measurement]) -> RichTable:
    style = dict(title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    drawn = RichTable("", title=table.title, padding=(0, 1), **style)  # pyright: ignore[reportArgumentType]
    drawn.columns[0].no_wrap = True
    for column in table.columns:
        drawn.add_column(column.title, justify="right", no_wrap=True)
    for m in measurements:
        wrong = " [bold red]WRONG[/bold red]" if m.failure else ""
        drawn.add_row(escape(_name(m)) + wrong, *(_written(m, column) for column in table.columns))
    return drawn


def _written(m: Measurement, column: Column) -> str:
    """A result as its column shows it; "-" where it does not apply."""
    value = m.results.get(column.result)
    return "-" if value is None else format(value, column.form)


def _name(m: Measurement) -> str:
    config = m.settings.get("config")
    return m.case if config is None else f"{m.case}, {config}"

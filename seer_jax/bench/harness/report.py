"""Where measurements go as they come: terminal, file and plot."""

import sys
from collections.abc import Iterable, Sequence

from seer_jax.bench.harness.config import BenchConfig
from seer_jax.bench.harness.measurement import Measurement, write_json
from seer_jax.bench.harness.plots import Panel, check_matplotlib, plot_panels
from seer_jax.bench.harness.tables import Table, print_tables, progress_line


def report(
    config: BenchConfig, measurements: Iterable[Measurement], tables: Sequence[Table], panels: Sequence[Panel]
) -> list[Measurement]:
    """Prints a line for each measurement, then the tables; writes the file and draws the plot if they are asked for.

    Raises:
      ImportError: a plot is asked for and matplotlib is not installed.
      ValueError: no measurement can be drawn.
    """
    from rich.console import Console

    if config.plot is not None:
        check_matplotlib()
    console, done = Console(), []
    if not console.is_terminal:
        console = Console(width=120)  # of a file; the tables are made for a wide terminal
    for measurement in measurements:
        done.append(measurement)
        console.print(progress_line(measurement), highlight=False, soft_wrap=True)
        if config.output is not None:  # after each one, so that an interrupted run leaves what it has
            write_json(config.output, done, command=sys.argv)
    print_tables(console, tables, done)
    if config.output is not None:
        console.print(f"Written: {config.output}", highlight=False, soft_wrap=True)
    if config.plot is not None:
        console.print(f"Drawn: {plot_panels(config.plot, panels, done)}", highlight=False, soft_wrap=True)
    return done

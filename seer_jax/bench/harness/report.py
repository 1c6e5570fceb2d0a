"""Measurements on the terminal and in a file, as they come."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pallas_kernels.bench import Measurement, write_report

if TYPE_CHECKING:
    from rich.console import Console


def report(measurements: Iterable[Measurement], output: Path | None) -> "tuple[Console, list[Measurement]]":
    """Prints a line for each, then the tables, and writes the file if one is asked for.

    Returns:
      Where it was printed, for more, and the measurements.
    """
    from rich.console import Console

    from seer_jax.bench.table import print_measurements, progress_line

    console, there = Console(), []
    if not console.is_terminal:
        console = Console(width=120)  # of a file; the tables are made for a wide terminal
    for measurement in measurements:
        there.append(measurement)
        console.print(progress_line(measurement), highlight=False, soft_wrap=True)
        if output is not None:  # after each one, so that an interrupted run leaves what it has
            write_report(output, there, command=sys.argv)
    print_measurements(console, there)
    if output is not None:
        console.print(f"Written: {output}", highlight=False, soft_wrap=True)
    return console, there

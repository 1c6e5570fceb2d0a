"""Measurements as tables for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pallas_kernels.bench import Measurement, hardware


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


MILLISECONDS = Column("ms", "milliseconds", ".4g", "milliseconds of one call, median of 5 runs")
DENSITY = Column("kept", "density", ".1%", "share of the causal map's blocks that are kept, measured")
RATE = Column("eff.\nTFLOP/s", "effective_tflops", ".3g", "4 b^2 D flop for each listed block of a head, over the time")
ERROR = Column("error", "error", ".1e", "of the output against float32 on sampled rows, relative")
PLAIN = Column(
    "plain\nerror", "plain_error", ".1e", "the same of attention without any trick in the same number format"
)
LSE = Column("lse\nerror", "lse_error", ".1e", "largest difference of the log of the softmax's sum on those rows")
DENSE = Column("dense\nms", "dense_milliseconds", ".4g", "dense attention of the same shape (cuDNN on a GPU)")
COMPILE = Column("compile\ns", "compile_seconds", ".1f", "tracing and compiling")
PEAK = Column("peak\nGiB", "peak_gib", ".1f", "most memory in use on the device, weights and cache included")
PLANNED = Column("planned\nGiB", "planned_gib", ".1f", "what the compiler lays out for a run")
SPEEDUP = Column("times\nfaster", "speedup", ".2f", "dense attention's (the dense layer's, model's) ms over ms")
LISTED = Column("kept", "density", ".1%", "share of a sequence's blocks that are listed, measured")
FLOOR = Column(
    "floor\nms", "floor_milliseconds", ".4g", "in which the memory of the device moves as much as must be read"
)
TIMES_FLOOR = Column("times\nfloor", "times_floor", ".2f", "ms over floor ms")
MEMORY = Column("memory\nTB/s", "memory_terabytes", ".3g", "rate of that memory, of a large sum or copy")

DENSE_BESIDE = (
    "model",
    "decode layer",
    "decode model",
)  # tables with a line of what is dense, for each batch and length

TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "attention": ("Attention kernel", (DENSITY, ERROR, PLAIN, LSE, MILLISECONDS, RATE, DENSE, SPEEDUP)),
    "cases": (
        "Attention kernel, odd cases",
        (
            *(DENSITY, ERROR, PLAIN, LSE, MILLISECONDS, RATE),
            Column("aligned\nTFLOP/s", "aligned_tflops", ".3g", "rate of the aligned case beside it"),
            Column("of\naligned", "share_of_aligned", ".0%", "rate over that of the aligned case"),
            *(DENSE, SPEEDUP),
        ),
    ),
    "ground truth": (
        "Dense attention with block scores",
        (
            *(ERROR, PLAIN, LSE),
            Column(
                "scores\nerror",
                "scores_error",
                ".1e",
                "largest error of the scores on those rows, over a row's largest",
            ),
            *(MILLISECONDS, DENSE),
            Column("times\ndense", "times_dense", ".3f", "ms over dense attention's ms"),
            Column("TFLOP/s", "effective_tflops", ".3g", "4 D flop for each key that a query sees, over the time"),
            Column(
                "extra\nGiB", "extra_gib", ".3f", "memory besides arguments and results, as the compiler lays it out"
            ),
        ),
    ),
    "selection": (
        "Gate and choice of blocks, one layer",
        (
            DENSITY,
            Column("gate\nms", "gate_milliseconds", ".4g", "pooling, projection and logits"),
            Column("choice\nms", "choice_milliseconds", ".4g", "from logits to lists"),
            Column("both\nms", "milliseconds", ".4g", "from queries and keys to lists, as the model does it"),
            Column("attention\nms", "attention_milliseconds", ".4g", "the kernel on random lists of that density"),
        ),
    ),
    "model": (
        "Whole model, time to first token",
        (
            DENSITY,
            MILLISECONDS,
            SPEEDUP,
            COMPILE,
            PEAK,
            PLANNED,
        ),
    ),
    "decode kernel": (
        "Attention kernel, new tokens",
        (*(LISTED, ERROR, PLAIN, LSE, MILLISECONDS, FLOOR, TIMES_FLOOR), DENSE, SPEEDUP, MEMORY),
    ),
    "decode layer": (
        "Attention of one layer with gate and cache, new tokens",
        (LISTED, MILLISECONDS, FLOOR, TIMES_FLOOR, SPEEDUP, MEMORY),
    ),
    "decode model": (
        "Whole model, one new token of each sequence",
        (
            *(LISTED, MILLISECONDS),
            Column("tokens/s", "tokens_per_second", ".4g", "new tokens of all sequences"),
            *(FLOOR, TIMES_FLOOR, SPEEDUP, COMPILE, PEAK, PLANNED, MEMORY),
        ),
    ),
    "training": (
        "Distillation, one step",
        (
            MILLISECONDS,
            Column(
                "forward\nms",
                "forward_milliseconds",
                ".4g",
                "dense forward of the same rows up to the last hidden states",
            ),
            Column("of\nforward", "of_forward", ".3f", "the step's ms over the forward's"),
            Column("model\nTFLOP/s", "tflops", ".3g", "flop of that forward alone, over the time of the step"),
            Column("of 700", "share_of_700", ".0%", "that rate over 700 TFLOP/s"),
            COMPILE,
            PEAK,
            PLANNED,
            Column("GPU\nhours", "recipe_hours", ".3g", "for the 0.52 billion tokens of the authors' prefill recipe"),
        ),
    ),
}


def measurement_table(title: str, columns: Sequence[Column], measurements: Sequence[Measurement]) -> Table:
    """One line per measurement; "-" where a quantity does not apply."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for m in measurements:
        values = [_written(m.results.get(column.result), column.form) for column in columns]
        table.add_row(_name(m) + (" [bold red]WRONG[/bold red]" if m.failure else ""), *values)
    return table


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _name(m: Measurement) -> str:
    config = m.settings.get("config")
    return m.case if config is None else f"{m.case}, {config}"


def progress_line(m: Measurement) -> str:
    """A measurement as it comes in."""
    time = m.results.get("milliseconds")
    outcome = f"[bold red]{m.failure}[/bold red]" if m.failure else f"{_written(time, '.4g')} ms"
    return f"{m.table}: {_name(m)}: {outcome}" + (f" ({m.note})" if m.note else "")


def print_measurements(console: Console, measurements: Sequence[Measurement]) -> None:
    """What it ran on, one table per part, and what each column means in one line."""
    machine, shown = hardware(), {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"\n{machine['device']} ({versions})", highlight=False, soft_wrap=True)
    for name, (title, columns) in TABLES.items():
        lines = [m for m in beside_each_other(measurements) if m.table == name]
        if lines:
            console.print()
            console.print(measurement_table(title, columns, lines))
            shown |= {" ".join(column.title.split()): column.meaning for column in columns}
    console.print()
    for word, meaning in shown.items():
        console.print(f"[bold]{word}[/bold]: {meaning}", highlight=False, soft_wrap=True)
    for note in dict.fromkeys(m.note for m in measurements if m.note):
        console.print(f"-: {note}", highlight=False, soft_wrap=True)


def beside_each_other(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements, with the attention's time beside the choice of blocks, and how much faster than dense layers and models are."""
    attention = {
        (m.settings["num_queries"], m.settings["density"]): m.results.get("milliseconds")
        for m in reversed(measurements)  # the first kind of lists at a length counts
        if m.table == "attention"
    }
    dense = {
        _beside_dense(m): m.results.get("milliseconds")
        for m in measurements
        if m.table in DENSE_BESIDE and m.settings["density"] is None
    }

    def more(m: Measurement) -> dict[str, float | None]:
        if m.table == "selection":
            return {"attention_milliseconds": attention.get((m.settings["length"], m.settings["density"]))}
        if m.table in DENSE_BESIDE:
            before, now = dense.get(_beside_dense(m)), m.results.get("milliseconds")
            return {"speedup": before / now if before and now else None}
        return {}

    return [dataclasses.replace(m, results={**m.results, **more(m)}) for m in measurements]


def _beside_dense(m: Measurement) -> tuple[Any, ...]:
    """What the dense line has in common with those that it is compared with."""
    return m.table, m.settings.get("batch"), m.settings["length"]

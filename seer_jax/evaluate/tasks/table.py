"""Scores of tasks as a printed table."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from seer_jax.evaluate.levels import JOIN
from seer_jax.evaluate.statistics.intervals import Estimate, Interval
from seer_jax.evaluate.table import figure_table
from seer_jax.evaluate.tasks.base import TaskPhase
from seer_jax.selection.scorers import SCORERS

DENSE, DENSE_MEANING = "dense", "every block"
PAIR = " + "  # between the titles of two scorers
TEXT = ("phase", "method", "policy")  # columns that fold
HEAD = (*TEXT, "score", "±", "over dense", "read")
MEANINGS = {
    "score": "mean over the samples of the task's metric: share of the answers that are found (RULER), F1, ROUGE-L, accuracy or edit "
    "similarity (LongBench), or the metric that is named",
    "±": "standard error of the score over samples",
    "over dense": "score less that of dense attention, with the 95% interval of the samples' differences",
    "read": "measured share of the visible key blocks that attention read in the phase, mean over samples and layers",
}


PHASES = {
    TaskPhase.PREFILL: "blocks are chosen for every row of a prompt, those of its question included; answers are decoded densely",
    TaskPhase.DECODE: "blocks are chosen for each token of the answer, after dense attention over the prompt",
    TaskPhase.BOTH: "blocks are chosen for every row of a prompt by the first policy, and for each token of the answer by the second; read: of "
    "the prompt + of the answer",
}


class Figures(NamedTuple):
    """One line of the table."""

    task: str
    title: str
    level: str
    phase: TaskPhase | None
    score: Estimate
    over_dense: Interval | None
    kept: Estimate
    is_share: bool = True
    kept_decode: Estimate | None = None


def title(method: str | None) -> str:
    """Title of a method, or of those of both phases, in tables."""
    return DENSE if method is None else PAIR.join(SCORERS[name].title for name in method.split(JOIN))


def cells(line: Figures) -> list[str]:
    """One line as text; what is missing is "-"."""
    form = ".1%" if line.is_share else ".3f"
    over = None if line.over_dense is None else line.over_dense.written(None if line.is_share else "{:+.3f}".format)
    shares = [kept for kept in (line.kept, line.kept_decode) if kept is not None and not math.isnan(kept.value)]
    return [
        "-" if line.phase is None else line.phase.value,
        line.title,
        "-" if line.title == DENSE else line.level,
        format(line.score.value, form),
        "-" if math.isnan(line.score.stderr) else format(line.score.stderr, form),
        over or "-",
        " + ".join(f"{kept.value:.1%}" for kept in shares) or "-",
    ]


def line_of(line: Figures) -> str:
    """One line as a sentence."""
    _, method, level, score, error, over, read = cells(line)
    what = method if line.phase is None else f"{line.phase} {method}, {level}"
    lead = "" if line.over_dense is None else f", over dense {over}"
    return f"{line.task} {what}: {score} ± {error}{lead}, blocks read {read}"


def legend(lines: Sequence[Figures]) -> dict[str, str]:
    """Meaning of the words in a table of these lines."""
    phases = {phase.value: meaning for phase, meaning in PHASES.items() if any(line.phase == phase for line in lines)}
    meanings = {DENSE: DENSE_MEANING} | {scorer.title: scorer.meaning for scorer in SCORERS.values()}
    titles = dict.fromkeys(name for line in lines for name in line.title.split(PAIR))
    return MEANINGS | phases | {name: meanings[name] for name in titles}


def _widths(rows: Sequence[Sequence[str]], available: int) -> list[int]:
    """Widths of the columns: those of their cells, but of text less where the terminal is too narrow, of the widest column first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    folds = range(len(TEXT))
    while sum(widths) + len(widths) - 1 > available and max(widths[n] for n in folds) > 1:
        widths[max(folds, key=lambda n: widths[n])] -= 1
    return widths


def print_figures(console: Console, lines: Sequence[Figures]) -> None:
    """Prints a table with a section for each task, and the meaning of each word in it."""
    widths = _widths([HEAD, *map(cells, lines)], console.width)

    def show(rows: Sequence[Sequence[str]], *, head: bool = False) -> None:
        table = figure_table(HEAD, text=TEXT, dim=("±",))
        table.show_header = head
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)

    show((), head=True)
    for task in dict.fromkeys(line.task for line in lines):
        console.print(f"[bold]{escape(task)}[/bold]", highlight=False, soft_wrap=True)
        show([cells(line) for line in lines if line.task == task])
    console.print()
    for word, meaning in legend(lines).items():
        console.print(f"[bold]{escape(word)}[/bold]: {escape(meaning)}", highlight=False, soft_wrap=True)

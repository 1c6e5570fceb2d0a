"""Scores of tasks as a printed table."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from seer_jax.evaluate.levels import Phase
from seer_jax.evaluate.score import Estimate
from seer_jax.evaluate.table import figure_table
from seer_jax.selection.scorers import SCORERS

DENSE, DENSE_MEANING = "dense", "every block"
HEAD = ("phase", "method", "policy", "score", "±", "over dense", "±", "read")
MEANINGS = {
    "score": "mean over the samples of the task's metric: share of the answers that are found (RULER), F1, ROUGE-L, accuracy or edit "
    "similarity (LongBench), or the metric that is named",
    "over dense": "score less that of dense attention, sample by sample",
    "±": "standard error of the figure before it, over samples",
    "read": "measured share of the visible key blocks that attention read in the phase, mean over samples and layers",
}
PHASES = {
    Phase.PREFILL: "blocks are chosen for every row of a prompt, those of its question included; answers are decoded densely",
    Phase.DECODE: "blocks are chosen for each token of the answer, after dense attention over the prompt",
}


class Figures(NamedTuple):
    """One line of the table."""

    task: str
    title: str
    level: str
    phase: Phase | None
    score: Estimate
    over_dense: Estimate | None
    kept: Estimate
    is_share: bool = True


def title(method: str | None) -> str:
    """Title of a method in tables."""
    return DENSE if method is None else SCORERS[method].title


def cells(line: Figures) -> list[str]:
    """One line as text; what is missing is "-"."""
    form, signed = (".1%", "+.1%") if line.is_share else (".3f", "+.3f")
    over = line.over_dense
    return [
        "-" if line.phase is None else line.phase.value,
        line.title,
        "-" if line.title == DENSE else line.level,
        *_written(line.score, form, form),
        *(("-", "-") if over is None else _written(over, signed, form)),
        "-" if math.isnan(line.kept.value) else f"{line.kept.value:.1%}",
    ]


def _written(estimate: Estimate, form: str, error: str) -> tuple[str, str]:
    value, stderr = estimate
    return format(value, form), "-" if math.isnan(stderr) else format(stderr, error)


def line_of(line: Figures) -> str:
    """One line as a sentence."""
    _, method, level, score, error, over, over_error, read = cells(line)
    what = method if line.phase is None else f"{line.phase} {method}, {level}"
    lead = "" if line.over_dense is None else f", over dense {over} ± {over_error}"
    return f"{line.task} {what}: {score} ± {error}{lead}, blocks read {read}"


def legend(lines: Sequence[Figures]) -> dict[str, str]:
    """Meaning of the words in a table of these lines."""
    phases = {phase.value: meaning for phase, meaning in PHASES.items() if any(line.phase == phase for line in lines)}
    meanings = {DENSE: DENSE_MEANING} | {scorer.title: scorer.meaning for scorer in SCORERS.values()}
    return MEANINGS | phases | {name: meanings[name] for name in dict.fromkeys(line.title for line in lines)}


def print_figures(console: Console, lines: Sequence[Figures]) -> None:
    """Prints a table with a section for each task, and the meaning of each word in it."""
    table = figure_table(HEAD, text=("phase", "method", "policy"), dim=("±",))
    for task in dict.fromkeys(line.task for line in lines):
        table.add_section()
        table.add_row(f"[bold]{escape(task)}[/bold]")
        for line in (line for line in lines if line.task == task):
            table.add_row(*map(escape, cells(line)))
    console.print(table)
    console.print()
    for word, meaning in legend(lines).items():
        console.print(f"[bold]{escape(word)}[/bold]: {escape(meaning)}", highlight=False, soft_wrap=True)

"""Scores as rows of text, as a printed table, and as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seer_jax.evaluate.comparison import Score
from seer_jax.selection.scorers import SCORERS, LearnedGate, Random, SinkWindow

QUANTITIES = {
    "ppl": "perplexity: how many equally likely tokens the model seems to choose from at each step of held-out text; lower is better",
    "keys": "pass keys: share of the long prompts whose hidden five digits are found exactly; higher is better",
    "read": "measured share of the visible key blocks that attention read, mean over rows and layers",
}
PHASES = {
    "prefill": "blocks are chosen for every row of a prompt, the rows of its question included",
    "decode": "blocks are chosen for each appended token, after dense attention over the prompt",
}
DENSE = "every block"
WIDE_LEVELS = 3  # more columns than these make do not fit a terminal of 80 characters


def table_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The scores as text: a head, then the rows. Missing scores are "-".

    For one to three levels there is a row for each phase and method, and a column for each quantity and level, headed for example
    "ppl 10%". Otherwise there is a row for each phase, method and level, and a column for each quantity.
    """
    levels = list(dict.fromkeys(s.level for s in scores if s.method is not None))
    if not 1 <= len(levels) <= WIDE_LEVELS:
        head = ["phase", "method", "level", *QUANTITIES]
        return [head, *([s.phase, s.title, s.level, *(_write(quantity, s) for quantity in QUANTITIES)] for s in scores)]
    found = {(s.phase, s.method, s.level): s for s in scores}
    rows = [["phase", "method", *(f"{quantity} {level}" for quantity in QUANTITIES for level in levels)]]
    for phase, method in dict.fromkeys((s.phase, s.method) for s in scores):
        of_levels = [found.get((phase, method, "dense" if method is None else level)) for level in levels]
        title = next(s.title for s in scores if s.method == method)
        rows.append([phase, title, *(_write(quantity, s) for quantity in QUANTITIES for s in of_levels)])
    return rows


def _write(quantity: str, score: Score | None) -> str:
    if score is None:
        return "-"
    if quantity == "ppl":
        return f"{score.perplexity:.2f}"
    share = score.passkey if quantity == "keys" else score.kept
    return "-" if math.isnan(share) else f"{share:.0%}"


def legend(scores: Sequence[Score]) -> dict[str, str]:
    """Meaning of the words in the table of these scores."""
    phases = {phase: meaning for phase, meaning in PHASES.items() if any(s.phase == phase for s in scores)}
    methods = dict.fromkeys(s.method for s in scores)
    titles = {"dense" if m is None else SCORERS[m].title: DENSE if m is None else SCORERS[m].meaning for m in methods}
    return QUANTITIES | phases | titles


def score_line(score: Score) -> str:
    """One score as a line of text."""
    method = score.title if score.method is None else f"{score.title}, {score.level}"
    found = f", pass keys {score.passkey:.0%}" if score.prompts else ""
    return (
        f"{score.phase} {method}: perplexity {score.perplexity:.3f}{found}, blocks read {score.kept:.1%} "
        f"({score.seconds:.1f} s)"
    )


def print_scores(console: Console, scores: Sequence[Score]) -> None:
    """Prints the table, and the meaning of each word in it."""
    head, *rows = table_rows(scores)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for column in head[2:]:
        table.add_column(column.replace(" ", "\n", 1), justify="left" if column == "level" else "right", no_wrap=True)
    for phase in dict.fromkeys(row[0] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{phase}[/bold]")
        for _, *cells in (row for row in rows if row[0] == phase):
            table.add_row(*cells)
    console.print(table)
    console.print()
    for word, meaning in legend(scores).items():
        console.print(f"[bold]{word}[/bold]: {meaning}", highlight=False, soft_wrap=True)


def write_scores(path: Path, scores: Sequence[Score], **facts: Any) -> None:
    """Writes JSON: the facts, `legend`, and `scores` with one object each; NaN becomes null."""
    rows = [{k: _plain(v) for k, v in dataclasses.asdict(s).items()} for s in scores]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "legend": legend(scores), "scores": rows}, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def losses(
    scores: Sequence[Score],
    *,
    method: str = LearnedGate.name,
    baselines: Sequence[str] = (SinkWindow.name, Random.name),
) -> list[str]:
    """One line for each place where a baseline is as good as the method or better."""
    found = {(s.phase, s.method, s.level): s for s in scores}
    lines = []
    for (phase, baseline, level), score in found.items():
        ours = found.get((phase, method, level))
        if baseline not in baselines or ours is None:
            continue
        if score.perplexity <= ours.perplexity:
            lines.append(
                f"{phase} {level}: {score.title} has perplexity {score.perplexity:.3f}, ours {ours.perplexity:.3f}"
            )
        if score.passkey >= ours.passkey:
            lines.append(
                f"{phase} {level}: {score.title} finds {score.passkey:.0%} of the pass keys, ours {ours.passkey:.0%}"
            )
    return lines

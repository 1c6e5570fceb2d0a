"""Scores as a table for people and as JSON for programs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seer_jax.evaluate.comparison import Method, Score

MEANING = {
    "ppl": "perplexity: among how many equally likely tokens the model seems to choose at each step of held-out text; lower is better",
    "keys": "pass keys: share of the long texts whose hidden five digits are found exactly; higher is better",
    "read": "measured share of the key blocks in sight that attention read, mean over rows and layers",
    "prefill": "the blocks are chosen for every row of a prompt, the question's rows too",
    "decode": "the blocks are chosen for each appended token, after dense attention over the prompt",
    "dense": "every block",
    "learned gate": "the distilled gates",
    "sink+window": "the first block and the latest ones",
    "random": "blocks at random, besides those always kept",
    "oracle": "the blocks with the largest true attention weights, which costs the dense attention it is to save",
}


def score_table(scores: Sequence[Score]) -> Table:
    """One line per phase and method, one column per quantity and setting."""
    settings = list(dict.fromkeys(s.setting for s in scores if s.method is not None))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in ("ppl", "keys", "read"):
        for setting in settings:
            table.add_column(f"{name}\n{setting}", justify="right", no_wrap=True)
    for phase in dict.fromkeys(s.phase for s in scores):
        table.add_section()
        table.add_row(f"[bold]{phase}[/bold]")
        of_phase = {(s.method, s.setting): s for s in scores if s.phase is phase}
        for method in dict.fromkeys(method for method, _ in of_phase):
            row = [of_phase.get((method, "dense" if method is None else setting)) for setting in settings]
            values = [
                [_perplexity(s) for s in row],
                [_share(s and s.passkey) for s in row],
                [_share(s and s.kept) for s in row],
            ]
            table.add_row("dense" if method is None else method.title, *(v for group in values for v in group))
    return table


def _perplexity(score: Score | None) -> str:
    return "-" if score is None else f"{score.perplexity:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"


def print_scores(console: Console, scores: Sequence[Score]) -> None:
    """The table, and what each word in it means in one line."""
    console.print(score_table(scores))
    console.print()
    shown = {s.title for s in scores} | {s.phase.value for s in scores}
    for word, meaning in MEANING.items():
        if word in shown or word in ("ppl", "keys", "read"):
            console.print(f"[bold]{word}[/bold]: {meaning}", highlight=False, soft_wrap=True)


def write_scores(path: Path, scores: Sequence[Score], **facts: Any) -> None:
    """JSON: the facts, then `scores`, one object each; NaN becomes null."""
    rows = [{k: _plain(v) for k, v in dataclasses.asdict(s).items()} for s in scores]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "scores": rows}, indent=1) + "\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def beaten(scores: Sequence[Score], *, by: Method = Method.GATE) -> list[str]:
    """Where a heuristic (sink+window, random) is as good as a method or better, one line each; empty is what we want."""
    found = {(s.phase, s.method, s.setting): s for s in scores}
    lines = []
    for (phase, method, setting), score in found.items():
        ours = found.get((phase, by, setting))
        if method in (Method.WINDOW, Method.RANDOM) and ours is not None:
            if score.perplexity <= ours.perplexity:
                lines.append(
                    f"{phase} {setting}: {score.title} has perplexity {score.perplexity:.3f}, ours {ours.perplexity:.3f}"
                )
            if score.passkey >= ours.passkey:
                lines.append(
                    f"{phase} {setting}: {score.title} finds {score.passkey:.0%} of the pass keys, ours {ours.passkey:.0%}"
                )
    return lines

"""Scores as rows of text and as a printed table, and the places where a baseline is as good as the gate."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seer_jax.evaluate.score import Estimate, Score, passkey_difference, perplexity_difference
from seer_jax.selection.scorers import SCORERS, LearnedGate, Random, SinkWindow

QUANTITIES = {
    "ppl": "perplexity: how many equally likely tokens the model seems to choose from at each step of held-out text; lower is better",
    "keys": "pass keys: share of the long prompts whose hidden five digits are found exactly; higher is better",
    "read": "measured share of the visible key blocks that attention read, mean over rows and layers. A row's own block is always "
    "read; where a top-k ranking of a prompt's blocks does not choose it, as random ones seldom do, it comes on top; "
    "a window never reads less than the first block and the row's own",
}
ERROR = "±"
ERROR_MEANING = "standard error of the figure before it, over windows (ppl), prompts (keys) or rows (read)"
PHASES = {
    "prefill": "blocks are chosen for every row of a prompt, the rows of its question included",
    "decode": "blocks are chosen for each appended token, after dense attention over the prompt",
}
DENSE = "every block"
CLEAR = 2.0  # standard errors that a lead must exceed


def table_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The scores as text: a head, then a row for each score. Each figure has its standard error behind it; missing ones are "-"."""
    head = ["phase", "method", "policy", *(cell for quantity in QUANTITIES for cell in (quantity, ERROR))]
    rows = [[s.phase, s.title, "-" if s.method is None else s.level, *_figures(s)] for s in scores]
    return [head, *rows]


def _figures(score: Score) -> list[str]:
    of = score.estimates
    cells = []
    for name, form in (("perplexity", ".2f"), ("passkey", ".0%"), ("kept", ".1%")):
        cells += ["-" if math.isnan(x) else format(x, form) for x in of[name]]
    return cells


def legend(scores: Sequence[Score]) -> dict[str, str]:
    """Meaning of the words in the table of these scores."""
    phases = {phase: meaning for phase, meaning in PHASES.items() if any(s.phase == phase for s in scores)}
    methods = dict.fromkeys(s.method for s in scores)
    titles = {"dense" if m is None else SCORERS[m].title: DENSE if m is None else SCORERS[m].meaning for m in methods}
    return QUANTITIES | {ERROR: ERROR_MEANING} | phases | titles


def score_line(score: Score) -> str:
    """One score as a line of text."""
    method = score.title if score.method is None else f"{score.title}, {score.level}"
    of = score.estimates
    found = f", pass keys {_written(of['passkey'], '.0%')}" if score.prompts else ""
    return (
        f"{score.phase} {method}: perplexity {_written(of['perplexity'], '.3f')}{found}, blocks read {score.kept:.1%} "
        f"({score.seconds:.1f} s)"
    )


def _written(estimate: Estimate, form: str) -> str:
    error = "" if math.isnan(estimate.stderr) else f" {ERROR} {estimate.stderr:{form}}"
    return f"{estimate.value:{form}}{error}"


def print_scores(console: Console, scores: Sequence[Score]) -> None:
    """Prints the table, and the meaning of each word in it."""
    head, *rows = table_rows(scores)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in head[1:]:
        is_text = column in ("method", "policy")
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
            style="dim" if column == ERROR else "",
        )
    for phase in dict.fromkeys(row[0] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{phase}[/bold]")
        for _, *cells in (row for row in rows if row[0] == phase):
            table.add_row(*map(escape, cells))
    console.print(table)
    console.print()
    for word, meaning in legend(scores).items():
        console.print(f"[bold]{escape(word)}[/bold]: {escape(meaning)}", highlight=False, soft_wrap=True)


def losses(
    scores: Sequence[Score],
    *,
    method: str = LearnedGate.name,
    baselines: Sequence[str] = (SinkWindow.name, Random.name),
) -> list[str]:
    """One line for each place where a baseline is as good as the method or better."""
    lines = []
    for baseline, ours in _pairs(scores, method, baselines):
        place = f"{ours.phase} {ours.level}: {baseline.title}"
        if baseline.perplexity <= ours.perplexity:
            lead = _written(perplexity_difference(ours, baseline), ".3f")
            lines.append(
                f"{place} has perplexity {baseline.perplexity:.3f}, ours {ours.perplexity:.3f} (higher by {lead})"
            )
        if baseline.passkey >= ours.passkey:
            lead = _written(passkey_difference(baseline, ours), ".0%")
            lines.append(
                f"{place} finds {baseline.passkey:.0%} of the pass keys, ours {ours.passkey:.0%} (fewer by {lead})"
            )
    return lines


def narrow_leads(
    scores: Sequence[Score],
    *,
    method: str = LearnedGate.name,
    baselines: Sequence[str] = (SinkWindow.name, Random.name),
) -> list[str]:
    """One line for each place where the method leads a baseline by no more than two standard errors, which may be chance."""
    lines = []
    for baseline, ours in _pairs(scores, method, baselines):
        place = f"{ours.phase} {ours.level}: {baseline.title}"
        for quantity, lead, form in (
            ("perplexity is higher", perplexity_difference(baseline, ours), ".3f"),
            ("share of pass keys is lower", passkey_difference(ours, baseline), ".0%"),
        ):
            if lead.value > 0 and not lead.value > CLEAR * lead.stderr:
                lines.append(f"{place}: its {quantity} by {_written(lead, form)}")
    return lines


def _pairs(scores: Sequence[Score], method: str, baselines: Sequence[str]) -> list[tuple[Score, Score]]:
    """Each baseline's score with the method's in the same phase and at the same level."""
    found = {s.key: s for s in scores}
    return [
        (score, found[phase, method, level])
        for (phase, baseline, level), score in found.items()
        if baseline in baselines and (phase, method, level) in found
    ]

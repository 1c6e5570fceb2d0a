"""Scores as rows of text and as a printed table, and the places where a baseline is as good as the gate."""

import math
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seer_jax.evaluate.score import Score, dense_of, passkey_difference, perplexity_over
from seer_jax.evaluate.statistics.blocks_needed import ABOVE, BELOW, BlocksNeeded, all_blocks_needed
from seer_jax.evaluate.statistics.intervals import Estimate, Interval
from seer_jax.selection.scorers import SCORERS, LearnedGate, Random, SinkWindow

QUANTITIES = {
    "ppl": "perplexity: how many equally likely tokens the model seems to choose from at each step of held-out text; lower is better",
    "over": "perplexity over that of dense attention on the same windows, with its 95% interval from the differences window by window",
    "keys": "pass keys: share of the long prompts whose hidden five digits are found exactly; higher is better",
    "±": "standard error of keys over prompts",
    "worst": "the smallest share of keys found at one depth, @ that depth (0 the start, 1 the question)",
    "read": "measured share of the visible key blocks that attention read, mean over windows and layers. A row's own block is always "
    "read; where a top-k ranking of a prompt's blocks does not choose it, as random ones seldom do, it comes on top; "
    "a window never reads less than the first block and the row's own",
}
PHASES = {
    "prefill": "blocks are chosen for every row of a prompt, the rows of its question included",
    "decode": "blocks are chosen for each token: all tokens of a window, the last ones of a pass-key prompt after dense attention over the others",
}
DENSE = "every block"


def figure_table(head: Sequence[str], *, text: Collection[str], dim: Collection[str] = ()) -> Table:
    """An empty table without a frame: columns of text fold where the terminal is narrow, figures are at the right and never cut.

    Args:
      head: titles of the columns.
      text: those of the columns that hold text.
      dim: those of the columns that stand back.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in head:
        is_text = name in text
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
            style="dim" if name in dim else "",
        )
    return table


def table_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The scores as text: a head, then a row for each score; missing figures are "-"."""
    head = ["phase", "method", "policy", *QUANTITIES]
    rows = [[s.phase, s.title, "-" if s.method is None else s.level, *_figures(s, dense_of(s, scores))] for s in scores]
    return [head, *rows]


def _figures(score: Score, dense: Score | None) -> list[str]:
    """The cells of `QUANTITIES`."""
    of, worst = score.estimates, score.passkey_worst
    over = Interval(*[math.nan] * 3) if dense is None or dense is score else perplexity_over(score, dense)
    figures = [
        (of["perplexity"].value, ".2f"),
        (of["passkey"].value, ".0%"),
        (of["passkey"].stderr, ".0%"),
        (of["kept"].value, ".1%"),
    ]
    cells = ["-" if math.isnan(x) else format(x, form) for x, form in figures]
    shown = "-" if math.isnan(over.value) else over.written()
    return [cells[0], shown, *cells[1:-1], "-" if worst is None else _depth(worst), cells[-1]]


def _depth(worst: tuple[float, Estimate]) -> str:
    return f"{worst[1].value:.0%}@{worst[0]:g}"


def legend(scores: Sequence[Score]) -> dict[str, str]:
    """Meaning of the words in the table of these scores."""
    phases = {phase: meaning for phase, meaning in PHASES.items() if any(s.phase == phase for s in scores)}
    methods = dict.fromkeys(s.method for s in scores)
    titles = {"dense" if m is None else SCORERS[m].title: DENSE if m is None else SCORERS[m].meaning for m in methods}
    return QUANTITIES | phases | titles


def score_line(score: Score, dense: Score | None = None) -> str:
    """One score as a line of text.

    Args:
      score: of any method.
      dense: dense attention in the same phase, to say how far the score is from it.
    """
    method = score.title if score.method is None else f"{score.title}, {score.level}"
    over = "" if dense is None or dense is score else f", {perplexity_over(score, dense).written()} over dense"
    worst = score.passkey_worst
    found = "" if worst is None else f", pass keys {score.passkey:.0%} (worst {_depth(worst)})"
    return f"{score.phase} {method}: perplexity {score.perplexity:.3f}{over}{found}, blocks read {score.kept:.1%} ({score.seconds:.1f} s)"


def print_scores(console: Console, scores: Sequence[Score]) -> None:
    """Prints the table without the figures that no score has, and the meaning of each word in it."""
    shown = [
        column
        for column in zip(*table_rows(scores), strict=True)
        if column[0] not in QUANTITIES or {*column[1:]} != {"-"}
    ]
    head, *rows = zip(*shown, strict=True)
    absent = QUANTITIES.keys() - {*head}
    table = figure_table(head[1:], text=("method", "policy"), dim=("±",))
    for phase in dict.fromkeys(row[0] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{phase}[/bold]")
        for _, *cells in (row for row in rows if row[0] == phase):
            table.add_row(*map(escape, cells))
    console.print(table)
    print_blocks_needed(console, all_blocks_needed(scores))
    console.print()
    for word, meaning in legend(scores).items():
        if word in absent:
            continue
        console.print(f"[bold]{escape(word)}[/bold]: {escape(meaning)}", highlight=False, soft_wrap=True)


def print_blocks_needed(console: Console, needed: Sequence[BlocksNeeded]) -> None:
    """Prints a line for each phase, method and rule; nothing where none has a ladder."""
    if not needed:
        return
    console.print(f"\nBlocks needed to stay within {needed[0].target:+.0%} of dense perplexity, with 95% intervals:")
    table = Table.grid(padding=(0, 2, 0, 0))
    for is_text in (False, True, True, False):
        table.add_column(no_wrap=not is_text, overflow="fold")
    for one in needed:
        table.add_row(one.phase, *map(escape, (SCORERS[one.method].title, one.rule)), needed_text(one))
    console.print(table)


def needed_text(needed: BlocksNeeded) -> str:
    """The share and its interval in words."""

    def place(share: float) -> str:
        sparsest, densest = needed.ladder
        return (
            f"below {sparsest:.1%}" if share == BELOW else f"above {densest:.1%}" if share == ABOVE else f"{share:.1%}"
        )

    if math.isnan(needed.low) or (needed.low == needed.high and math.isinf(needed.low)):
        return place(needed.kept)
    return f"{place(needed.kept)} ({place(needed.low)} to {place(needed.high)})"


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
            lead = perplexity_over(ours, baseline).written()
            lines.append(f"{place} has perplexity {baseline.perplexity:.3f}, ours {ours.perplexity:.3f}: {lead}")
        if baseline.passkey >= ours.passkey:
            lines.append(f"{place} finds {baseline.passkey:.0%} of the pass keys, ours {ours.passkey:.0%}")
    return lines


def narrow_leads(
    scores: Sequence[Score],
    *,
    method: str = LearnedGate.name,
    baselines: Sequence[str] = (SinkWindow.name, Random.name),
) -> list[str]:
    """One line for each place where the method leads a baseline by a difference whose 95% interval holds 0 or is unknown."""
    lines = []
    for baseline, ours in _pairs(scores, method, baselines):
        place = f"{ours.phase} {ours.level}: {baseline.title}"
        for quantity, lead in (
            ("perplexity over the gate's", perplexity_over(baseline, ours)),
            ("share of pass keys below the gate's", passkey_difference(ours, baseline)),
        ):
            if lead.value > 0 and not lead.low > 0:
                lines.append(f"{place}: {quantity} by {lead.written()}")
    return lines


def _pairs(scores: Sequence[Score], method: str, baselines: Sequence[str]) -> list[tuple[Score, Score]]:
    """Each baseline's score with the method's in the same phase and at the same level."""
    found = {s.key: s for s in scores}
    return [
        (score, found[phase, method, level])
        for (phase, baseline, level), score in found.items()
        if baseline in baselines and (phase, method, level) in found
    ]

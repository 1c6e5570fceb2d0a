"""Tables of a study, made of what its output folder holds."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer_jax.evaluate import BlocksNeeded, Interval, Phase, Score, blocks_needed, loss_at, score_from_json
from seer_jax.evaluate.score import dense_of, to_json
from seer_jax.evaluate.statistics.blocks_needed import TARGET, ladders
from seer_jax.evaluate.table import needed_text
from seer_jax.outputs import write_json, write_text
from seer_jax.selection.scorers import SCORERS, LearnedGate

FACTS = "variant.json"
ERROR = "error.txt"
SHARES = (0.08, 0.1, 0.15, 0.2, 0.3, 0.4)
HEAD = (
    "variant",
    "rule",
    "for +1%",
    *(f"{share:.0%}" for share in SHARES),
    "recall",
    "parameters",
    "bytes of keys",
    "tokens/s",
)


def write_tables(output: Path) -> list[dict[str, Any]]:
    """Writes table.json and table.md of all variants in a folder, and returns the rows, JSON.

    A row is a ladder of one method and rule: `needed`, the share of the blocks for +1% of dense perplexity; `over_dense` by share of the
    blocks, interpolated; costs and block recall of the gate. Both have 95% intervals over windows.
    """
    rows = [row for folder in sorted(output.iterdir()) if folder.is_dir() for row in _rows(folder)]
    phases = list(Phase)
    rows.sort(key=lambda row: (phases.index(Phase(row["phase"])), _order(row["needed"])))
    failed = {path.parent.name: path.read_text(encoding="utf-8").strip() for path in output.glob(f"*/{ERROR}")}
    write_json(output / "table.json", {"rows": rows, "failed": failed})
    write_text(output / "table.md", as_markdown(rows, failed))
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str] | None = None) -> str:
    """The rows as a table for each phase, those that need the fewest blocks first."""
    parts = [
        "Perplexity over dense attention at shares of the blocks, interpolated between measured levels; 95% intervals over windows.\n",
    ]
    for phase in Phase:
        chosen = [row for row in rows if row["phase"] == phase]
        if chosen:
            lines = [["-" if x is None else x for x in _cells(row)] for row in chosen]
            table = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *lines)]
            parts.append("\n".join([f"**{phase}**", "", *table, ""]))
    parts += [f"{line}\n" for line in dict.fromkeys(map(_legend, rows))]
    parts += [f"{name} failed: {reason}\n" for name, reason in (failed or {}).items()]
    return "\n".join(parts)


def _legend(row: Mapping[str, Any]) -> str:
    """What a variant is, and what was measured of it beside scores."""
    target = row["settings"].get("target")
    line = f"{row['variant']}: {row['meaning']}" + (f"; target {target}" if target else "")
    return line + (f"; {json.dumps(row['measured'])}" if row["measured"] else "")


def _cells(row: Mapping[str, Any]) -> list[str | None]:
    costs = row["costs"]

    def number(name: str, form: str) -> str | None:
        return None if costs.get(name) is None else format(costs[name], form)

    over = (row["over_dense"][f"{share:g}"]["value"] for share in SHARES)
    return [
        row["variant"] if row["method"] == LearnedGate.name else SCORERS[row["method"]].title,
        row["rule"],
        row["needed"]["text"],
        *(None if x is None else f"{x:+.2%}" for x in over),
        number("recall", ".3f"),
        number("parameters", ",.0f"),
        number("key_bytes", ",.0f"),
        number("tokens_per_second", ",.0f"),
    ]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Of one variant."""
    facts = _read(folder / FACTS)
    found = []
    for phase in Phase:
        values = _read(folder / phase.value / "scores.json")
        scores = [score_from_json(score) for score in values.get("scores", ())]
        for (_, method, rule, _), ladder in ladders(scores).items():
            dense = dense_of(ladder[0], scores)
            if dense is not None and len(ladder) >= 2:
                found.append(_row(folder.name, facts, phase, method, rule, ladder, dense))
    return found


def _row(
    name: str, facts: Mapping[str, Any], phase: Phase, method: str, rule: str, ladder: Sequence[Score], dense: Score
) -> dict[str, Any]:
    kept = [score.kept for score in ladder]
    needed = BlocksNeeded(
        phase, method, rule, TARGET, *blocks_needed(ladder, dense), (min(kept), max(kept)), len(ladder)
    )
    over: dict[str, Interval] = {f"{share:g}": loss_at(ladder, dense, share) for share in SHARES}
    return to_json(
        {
            "phase": phase.value,
            "variant": name,
            "meaning": facts.get("meaning", ""),
            "settings": facts.get("settings", {}),
            "method": method,
            "rule": rule,
            "needed": {**needed.to_json(), "text": needed_text(needed)},
            "over_dense": {share: interval._asdict() for share, interval in over.items()},
            "levels": [
                {
                    "level": s.level,
                    "kept": s.kept,
                    "loss": sum(a.loss - b.loss for a, b in zip(s.windows, dense.windows, strict=True))
                    / len(s.windows),
                }
                for s in ladder
            ],
            "costs": _costs(facts.get("costs", {}), phase),
            "measured": facts.get("measured"),
            "seconds": sum(score.seconds for score in ladder),
        }
    )


def _costs(costs: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    """Those of the gate of a phase, without its name."""
    own = {name.removeprefix(f"{phase}_"): value for name, value in costs.items() if name.startswith(f"{phase}_")}
    others = {
        name: costs[name] for name in ("tokens_per_second", "steps", "tokens", "model_key_bytes") if name in costs
    }
    return own | others


def _order(needed: Mapping[str, Any]) -> float:
    if needed["kept"] is not None:
        return needed["kept"]
    return -math.inf if needed["is_below"] else math.inf


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""Results and table of the extension, made of what its output folder holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seer_jax.evaluate import Score, perplexity_over, score_from_json
from seer_jax.evaluate.score import to_json
from seer_jax.outputs import write_json, write_text
from seer_jax.smollm2.extension.config import MEANINGS, Stage
from seer_jax.smollm2.extension.measuring import CALIBRATED, EXTENDED, SCORES

FACTS = "facts.json"
DENSE = "dense"
SPARSEST = "topk:0.1"
# PG19 at 32k, Llama-3.1-8B from 8k: SeerAttention, arXiv 2410.13276.
PAPER = {
    "dense YaRN": {DENSE: 8.79},
    "YaRN with gates": {"topk:0.5": 8.81, SPARSEST: 9.16},
    "gates after YaRN": {SPARSEST: 10.18},
}


def write_results(output: Path) -> str:
    """Writes results.json and table.md, and returns the latter's text.

    results.json: `stages` with seconds and tokens, `rows` with a row for each model and level, `losses` (see `sparse_losses`), and `paper`.
    """
    scores = {
        name: [score_from_json(one) for one in json.loads(path.read_text(encoding="utf-8"))["scores"]]
        for name in EXTENDED
        if (path := output / "measured" / name / SCORES).exists()
    }
    stages = json.loads((output / FACTS).read_text(encoding="utf-8")) if (output / FACTS).exists() else {}
    rows = _rows(scores)
    results = {"stages": stages, "rows": rows, "losses": sparse_losses(rows), "paper": PAPER}
    write_json(output / "results.json", results)
    text = _as_markdown(results)
    write_text(output / "table.md", text)
    return text


def sparse_losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By level, what YaRN with gates loses against dense YaRN as a share of what gates after YaRN lose."""
    over: dict[tuple[str, str], Any] = {
        (row["model"], row["level"]): row["over"]["value"] for row in rows if row["over"] is not None
    }
    both = [(level, over.get(("after", level))) for name, level in over if name == "joint" and level != DENSE]
    return {level: over["joint", level] / after for level, after in both if after is not None and after > 0}


def _rows(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """`over`: perplexity over that of dense YaRN, minus 1, with its 95% interval over windows; None where that is not measured."""
    reference = next((one for one in scores.get("after", ()) if one.method is None), None)
    rows = []
    for name, found in scores.items():
        for one in found:
            estimates = one.estimates
            over = None if reference is None or one is reference else perplexity_over(one, reference)
            rows.append(
                {
                    "model": name,
                    "level": one.level,
                    "perplexity": estimates["perplexity"].value,
                    "over": None if over is None else to_json(over._asdict()),
                    "kept": estimates["kept"].value,
                    "passkey": estimates["passkey"].value if one.prompts else None,
                    "windows": len(one.windows),
                    "seconds": one.seconds,
                }
            )
    return rows


def _as_markdown(results: Mapping[str, Any]) -> str:
    parts = [
        _table(
            ("model", "level", "blocks kept", "perplexity", "over dense YaRN", "pass keys", "paper (PG19)"),
            [_cells(row) for row in results["rows"]],
        ),
        _table(("stage", "seconds", "tokens", "does"), [_stage(name, of) for name, of in results["stages"].items()]),
    ]
    words = {level: f"{level} {share:.2f}" for level, share in results["losses"].items()}
    if words:
        parts.append(f"Loss of YaRN with gates as a share of that of gates after YaRN: {', '.join(words.values())}.")
    if curves := results["stages"].get(Stage.SCRATCH):
        ends = [
            f"{name} {curves[name][0]['loss']:.3f} to {curves[name][-1]['loss']:.3f}"
            for name in ("dense", "sparse")
            if name in curves
        ]
        parts.append(f"From random weights, loss in nats per token: {', '.join(ends)}.")
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    meaning, level, over = EXTENDED[row["model"]].meaning, row["level"], row["over"]
    title = "dense YaRN" if (row["model"], level) == ("after", DENSE) else meaning
    paper = PAPER.get(title, {}).get(level)
    return [
        title,
        level.replace(f"{CALIBRATED}:", "thresholds for "),
        f"{row['kept']:.1%}",
        f"{row['perplexity']:.4g}",
        "-" if over is None else _interval(over),
        "-" if row["passkey"] is None else f"{row['passkey']:.0%}",
        "-" if paper is None else f"{paper} ({paper / PAPER['dense YaRN'][DENSE] - 1:+.1%})",
    ]


def _interval(over: Mapping[str, Any]) -> str:
    ends = [over.get(name) for name in ("low", "high")]
    return f"{over['value']:+.2%}" + ("" if None in ends else f" ({ends[0]:+.2%} to {ends[1]:+.2%})")


def _stage(name: str, facts: Mapping[str, Any]) -> list[str]:
    seconds = f"{facts['seconds']:.0f}{'' if facts['finished'] else ' (not finished)'}"
    return [name, seconds, f"{facts['tokens']:,}" if "tokens" in facts else "-", MEANINGS[Stage(name)]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
